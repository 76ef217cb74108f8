"""
Nouns and COCO objects in a text: what Object HalBench and AMBER count.

The official scorers split a text with NLTK and look nouns up in WordNet. Here a noun is known if the benchmark's own
vocabulary has it, which is all that scoring needs. The endings are WordNet's, surprises included: "men" is an entry of
its own there and never becomes "man", and of several possible singulars the shortest is taken: "vases" become "vas", a
duct.
"""
import re
from pathlib import Path

from engine.files import read_text

ENDINGS = [("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
           ("men", "man"), ("ies", "y"),
           # what WordNet lists word by word: knives, grandchildren, mice, geese, oxen, busses, buffaloes, taxies
           ("ives", "ife"), ("children", "child"), ("mice", "mouse"), ("geese", "goose"), ("oxen", "ox"),
           ("busses", "bus"), ("oes", "o"), ("xies", "xi")]
# Nouns that WordNet reads as a word outside of the vocabularies, and so never as one of theirs.
IRREGULAR = {"men": "men", "vases": "vas", "sports": "sport", "leaves": "leaf", "sunglasses": "sunglass",
             "slippers": "slipper", "chopsticks": "chopstick", "earrings": "earring", "brethren": "brother"}

# COCO's 80 categories, one per line, each followed by its synonyms. This table is ours; a `synonyms.txt` of the same
# format in the benchmark's folder replaces it, and should, for a number comparable with the paper's.
SYNONYMS = Path(__file__).with_name("coco_synonyms.txt")
# Words that a chat model may put around a noun when it lists objects. Every other word passes for a noun.
NOT_NOUNS = set(read_text(Path(__file__).with_name("not_nouns.txt")).split())


def lemma(word: str, vocabulary: set[str]) -> str:
    """The singular that the vocabulary knows, else the word itself: buses -> bus, women -> woman, men -> men."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    candidates = [word] + [word.removesuffix(end) + new for end, new in ENDINGS if word.endswith(end)]
    return min((candidate for candidate in candidates if candidate in vocabulary), key=len, default=word)


# What NLTK's word_tokenize separates from a word, in its order; everything else stays inside: dog—cat, dog.The,
# bird's-eye and 'dog are single words, and no dog.
SEPARATE = [(r"'(?![mtsdn])(\w)\b", r"' \1"),                                             # before a single letter
            (r"([^.])(\.)(?=[\s?!)\";}\]*:@'({\[]|[»”’>]*\s*$)", r"\1 \2 "),    # that ends a sentence
            (r"[«“‘„`»”’\"]|''", r" \g<0> "),
            (r"([:,])(\D|$)", r" \1 \2"),
            (r"\.{2,}|--|[;@#$%&?!*\[\](){}<>]", r" \g<0> "),
            (r"([^'\s])('[smd]?|'ll|'re|'ve|n't)(?!\S)", r"\1 \2 ")]


def word_tokens(text: str) -> list[str]:
    """Words and punctuation marks: a comma between two words keeps them from becoming one object."""
    for pattern, spaced in SEPARATE:
        text = re.sub(pattern, spaced, text)
    return text.split()


class CocoWords:
    """
    Finds COCO's objects: "Two dogs, a hot dog and a baby elephant." -> ["dog", "hot dog", "elephant"].

    Two adjacent words that name one thing are joined first, so that a hot dog is no dog, a train track no train, and a
    toilet seat no chair. Only pairs are joined: "stove top oven" never is, and its words count one by one.
    """

    def __init__(self, table: str):
        self.category = {}  # word -> COCO category
        self.double = {"home plate": "home plate", "train track": "train track"}  # pair -> what it is looked up as
        for line in table.strip().splitlines():
            words = [word.strip() for word in line.split(",") if word.strip()]
            for word in words:
                self.category[word] = words[0]
                if " " in word:
                    self.double[word] = word
        for animal in "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split():
            self.double[f"baby {animal}"] = self.double[f"adult {animal}"] = animal
        for vehicle in ("jet", "train"):
            self.double[f"passenger {vehicle}"] = vehicle
        self.double |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
        self.vocabulary = {part for word in [*self.category, *self.double] for part in word.split()}

    def lemmas(self, text: str) -> list[str]:
        return [lemma(token, self.vocabulary) for token in word_tokens(text.lower())]

    def categories(self, words: list[str]) -> list[str]:
        """The categories of those words, doubles joined, that have one. A word that occurs twice counts twice."""
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [self.category[word] for word in words if word in self.category]

    def in_text(self, text: str) -> list[str]:
        words, joined, i = self.lemmas(text), [], 0
        while i < len(words):
            pair = " ".join(words[i:i + 2])
            joined.append(self.double.get(pair, words[i]))
            i += 2 if pair in self.double else 1
        return self.categories(joined)

    def in_list(self, objects: list[str]) -> list[str]:
        """
        The same for a list of objects from a chat model. A string counts for its double words if it has any, else each
        run of nouns counts as *one* thing, so that an office chair is no chair; nothing counts twice. The official
        code finds nouns with a parser (spaCy), this one with NOT_NOUNS.
        """
        found = {}  # a dict for its order
        for phrase in objects:
            words = self.lemmas(phrase)
            names = [self.double[pair] for pair in map(" ".join, zip(words, words[1:])) if pair in self.double]
            if not names:
                marked = ["|" if word in NOT_NOUNS or not word[0].isalnum() else word for word in words]
                names = [run.strip() for run in " ".join(marked).split("|") if run.strip()]
            found |= dict.fromkeys(names)
        return self.categories(list(found))
