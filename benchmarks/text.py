"""
Short answers against ten annotators: the normalizer of the VQA family (the "EvalAI" or "M4C" processor) and its soft
accuracy. VizWiz and TextVQA score with them.
"""
import re
from pathlib import Path

from engine.files import read_text

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = ("a", "an", "the")


def contractions() -> dict[str, str]:
    """Spelling with one apostrophe missing -> the word: dont -> don't, couldnt've and couldn'tve -> couldn't've."""
    table = {}
    for word in read_text(Path(__file__).with_name("contractions.txt")).split():
        for i, letter in enumerate(word):
            if letter == "'":
                table[word[:i] + word[i + 1:]] = word
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}  # sic


CONTRACTIONS = contractions()


def normalize(text: str) -> str:
    """
    "The 1,000 dogs." -> "1000 dogs", "red,white" -> "redwhite", "a.m." -> "am", "What's" -> "what 's"

    The order of the steps is part of the rule: commas are deleted before the punctuation step, so none becomes a space.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    before = text
    for symbol in PUNCTUATION:       # next to a space anywhere in the text: deleted everywhere; otherwise a space
        next_to_space = symbol + " " in before or " " + symbol in before
        text = text.replace(symbol, "" if next_to_space else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # 32: the official code passes the flag re.UNICODE as the count
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(answer: str, golds: list[str]) -> float:
    """
    The mean over annotators of min(matches among the *others* / 3, 1), for normalized strings. If k of ten annotators
    gave the answer, k = 0, 1, 2, 3, 4 scores 0, 0.3, 0.6, 0.9, 1.
    """
    scores = []
    for i in range(len(golds)):      # left out by position: equal answers of two annotators are still two answers
        others = golds[:i] + golds[i + 1:]
        scores.append(min(others.count(answer) / 3, 1))
    return sum(scores) / len(scores)
