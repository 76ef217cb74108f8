"""
How free text becomes a score: every rule of the official scorers on worked cases, above all on those that surprise.

The expected values are those of the official scorers, worked out by hand from their rules.
"""
from collections import Counter

import pytest

from benchmarks import amber, mmbench, mme, mmhal, pope, scienceqa, textvqa
from benchmarks.common import without_suffix
from benchmarks.objects import SYNONYMS, CocoWords, lemma
from benchmarks.paper import markdown, our_row
from benchmarks.text import CONTRACTIONS, normalize, soft_accuracy
from configurator import UserError


@pytest.mark.parametrize("text, expected", [
    ("The 1,000 dogs.", "1000 dogs"),        # the comma goes first, so no digit-comma-digit is left for step 3
    ("red,white", "redwhite"),
    ("a.m.", "am"),
    (".5", ".5"),                            # a full stop before a digit stays,
    ("3.5 ft.", "3.5 ft"),
    ("5.", "5"),                             # one after a digit does not
    ("What's", "what 's"),
    ("q & a", "q &"),                        # & is no punctuation here, a is an article
    ("", ""), ("the", ""), ("The a an", ""),
    ("top-left", "top left"),                # inside words: a space
    ("top-left - two", "topleft 2"),         # next to a space anywhere: deleted everywhere
    ("yes/no", "yes no"), ("(red)", "red"), ("a\tb\nc", "b c"),
    ("None", "0"), ("zero", "0"), ("Ten", "10"), ("eleven", "eleven"),
    ("dont", "don't"), ("couldntve", "couldntve"), ("couldn'tve", "couldn't've"), ("couldnt've", "couldn't've"),
    ("somebody'd", "somebodyd"), ("Im", "im"),  # the table's key is Im, and the text is in lower case by then
    ("its", "its"), ("well", "well"), ("shes", "shes"), ("twas", "'twas"), ("oclock", "o'clock"),
    ("50%: $5 #1 * it's", "50%: $5 #1 * it 's"),
    ("where?", "where"), ("hey!", "hey"), ("wow ! yes!no", "wow yesno"),
    ("é—ü", "é—ü"),
])
def test_vqa_normalizer(text, expected):
    assert normalize(text) == expected


def test_normalizer_deletes_at_most_32_full_stops():
    assert normalize("." * 40) == "." * 8


def test_contractions_are_the_official_120():
    assert len(CONTRACTIONS) == 120
    for key, value in [("arent", "aren't"), ("mustve", "must've"), ("yall", "y'all"), ("y'alldve", None),
                       ("yall'd've", "y'all'd've"),
                       ("'ow'sat", "'ow's'at"), ("ow's'at", "'ow's'at"), ("let's", "let's"), ("wed've", "we'd've"),
                       ("itd've", "it'd've")]:
        assert CONTRACTIONS.get(key) == value
    assert not {"its", "shes", "were", "well", "ill", "id", "shed", "wed", "hell"} & set(CONTRACTIONS)


@pytest.mark.parametrize("k, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_soft_accuracy_by_number_of_matching_annotators(k, expected):
    golds = ["cat"] * k + [f"other {i}" for i in range(10 - k)]
    assert soft_accuracy("cat", golds) == pytest.approx(expected)


def test_soft_accuracy_leaves_out_by_position():
    # Leaving out "equal records" would drop all three cats at once, and then score 7/10 * 1 = 0.7.
    assert soft_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx(3 / 10 * 2 / 3 + 7 / 10 * 1)
    assert soft_accuracy("", [""] * 10) == 1  # "the" and silence match each other


@pytest.mark.parametrize("text, expected", [
    ("A", "A"), (" B \n", None), ("B\n", None), (" B", None), ("A. rock", "A"), ("C. ", "C"), ("A. ", "A"),
    ("A.\n", None),
    (" A. rock", None), ("A. a\nb", "A"), ("A.", None), ("(A)", None),
    ("A)", None), ("a", None),
    ("F", None), ("The answer is B.", "B"), ("I think. The answer is C!", "C"), ("The answer is Bananas", "B"),
    ("The answer is B", None),
    ("The answer is A. The answer is B.", None), ("the answer is B.", None), ("The answer is Q.", "Q"), ("", None),
    ("E", "E"),
])
def test_scienceqa_letters(text, expected):
    assert scienceqa.parse(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("yes", "yes"), ("Yes, it is", "yes"), ("NO", "no"), ("Nope", "no"), ("None", "no"), ("Not sure", "no"),
    ("Snow", "no"), ("I know", "other"),
    ("Y", "other"), ("Yeah", "other"), ("The answer is yes", "other"), ("", "other"), (" yes", "yes"),
    ("  yes", "other"), ("a no", "no"),
])
def test_mme_reads_four_characters(text, expected):
    assert mme.parse(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("No", "no"), ("no", "no"), ("No, there is not.", "no"), ("There is not", "no"), ("No.", "no"), ("Yes", "yes"),
    ("NO", "yes"),
    ("Not really", "yes"), ("No!", "yes"), ("isn't", "yes"), ("None", "yes"), ("", "yes"), ("Yes. No", "yes"),
    ("a\nno", "yes"), ("n,o", "no"),
    ("There is no kite", "no"),
])
def test_pope_yes_and_no(text, expected):
    assert pope.parse(text) == expected


def test_pope_rates_by_hand():
    pairs = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "yes")] * 2 + [("no", "no")] * 4
    rates = pope.rates(pairs)
    expected = {"precision": 75, "recall": 60, "f1": 200 / 3, "accuracy": 70, "yes_ratio": 40, "gold_yes_ratio": 50}
    assert {rate: rates[rate] for rate in expected} == pytest.approx(expected)
    nothing = pope.rates([("no", "yes"), ("no", "no")])  # the official code divides by zero here
    assert nothing["f1"] == nothing["precision"] == nothing["recall"] == 0


FOUR = {"A": "red", "B": "blue", "C": "green", "D": "dark green"}


@pytest.mark.parametrize("text, options, expected", [
    ("B", FOUR, "B"), ("(B)", FOUR, "B"), ("B: blue", FOUR, "B"), ("The answer is {C}!", FOUR, "C"),
    ("b", FOUR, None),
    ("A blue one", FOUR, "A"),                          # an article passes for the letter
    ("A red one, not B", FOUR, "A"),                    # two letters, so the texts decide
    ("A or B", FOUR, None), ("blue", FOUR, "B"), ("It is Blue", FOUR, "B"),
    ("dark green", FOUR, None),                         # contains "green" too
    ("Cannot determine the answer, B", FOUR, "Z"), ("Z", FOUR, "Z"), ("Z B", FOUR, "B"), ("Z A B", FOUR, None),
    ("D", {"A": "x1", "B": "x2"}, None),                # no such option
    ("`B`", FOUR, None), ("B?", FOUR, None), ("B。", FOUR, None), ('"B"', FOUR, None), ("", FOUR, None),
    ("E", FOUR, None), ("B B", FOUR, "B"),
    # no letter is read from the sentence of a failed request, and no refusal, but the texts of the options are
    ("Failed to obtain answer via API.", FOUR, None), ("Failed to obtain answer via API. B", FOUR, None),
    ("Failed to obtain answer via API. Z", FOUR, None), ("Failed to obtain answer via API: blue. A", FOUR, "B"),
    ("Cannot determine the answer. Failed to obtain answer via API", FOUR, None),
])
def test_mmbench_letters(text, options, expected):
    assert mmbench.parse(text, options) == expected


@pytest.mark.parametrize("cell, expected", [
    ("", True), (None, True), ("None", True), ("NONE", True), ("nan", True), ("NA", True), ("N/A", True),
    ("null", True),
    ("NULL", True), ("Null", False), ("Na", False), ("0", False), ("None of them", False)])
def test_mmbench_empty_cells(cell, expected):
    assert mmbench.is_empty(cell) == expected


@pytest.mark.parametrize("prompt", [
    "What is the Bus number?\nReference OCR token: 42, CITY\nShort.",
    "Reference OCR token: 42\nWhat is the Bus number?\nShort.",
    "What is the Bus number?\nReference OCR token: \nShort.", "What is the Bus number?\nShort.",
    "What is the Bus number?\nShort.\nReference OCR token: 42", "What is the Bus number?\nReference OCR token: \n",
    "OCR tokens: 42, A. Question: What is the Bus number? Short answer:",
    "OCR tokens: 42\nA\nB\n. Question: What is the Bus number? Short answer:"])
def test_textvqa_finds_the_question_in_the_prompt(prompt):
    assert textvqa.question_in(prompt, "") == "what is the bus number?"


def test_textvqa_a_legacy_question_may_hold_a_newline():
    prompt = "OCR tokens: 42. Question: What is\nthe Bus number? Short answer:"
    assert textvqa.question_in(prompt, "") == "what is\nthe bus number?"


@pytest.mark.parametrize("prompt", ["What?", "a\nb\nc", "a\nReference OCR token:\nc", "a\nb\nc\nd",
                                    "OCR tokens: 42\nWhat?"])
def test_textvqa_prompt_of_another_form(prompt):
    with pytest.raises(UserError, match="here: cannot tell the question"):
        textvqa.question_in(prompt, "here")


@pytest.mark.parametrize("reply, expected", [
    ("Fine.\nRating: 6", 6), ("rating: 0", 0), ("Rating: 3 ... so Rating: 3", 3), ("Rating:4", None),
    ("**Rating**: 4", None),
    ("Rating: 10", 1), ("Rating: 2 or Rating: 3", None), ("", None), ("Rating: 7", None)])
def test_mmhal_ratings(reply, expected):
    assert mmhal.parse(reply) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Words and COCO objects

TABLE = SYNONYMS.read_text()
COCO = CocoWords(TABLE)


def test_the_built_in_table():
    lines = TABLE.strip().splitlines()
    assert len(lines) == 80 and len({line.split(",")[0] for line in lines}) == 80
    words = [word.strip() for line in lines for word in line.split(",")]
    assert len(words) == len(set(words))  # a word with two categories would silently take the last


@pytest.mark.parametrize("text, expected", [
    ("Two dogs and a cat.", ["dog", "cat"]),
    ("A dog, the dog, no dog", ["dog"] * 3),                             # every repetition counts, and "no dog" too
    # a comma parts what is not one thing
    ("a hot dog", ["hot dog"]), ("hot dogs", ["hot dog"]), ("a hot, dog", ["dog"]),
    ("a train track and a train", ["train"]), ("home plate", []),
    ("a baby elephant and an adult bear", ["elephant", "bear"]), ("a baby", ["person"]),
    ("a passenger train and a passenger jet", ["train", "airplane"]), ("a passenger", ["person"]),
    ("a bow tie", ["tie"]), ("a toilet seat", ["toilet"]), ("the seat of the toilet", ["toilet"]),
    ("a seat", ["chair"]),
    ("wine glasses", ["wine glass"]), ("a stove top oven", ["oven", "oven"]),        # three words never merge
    ("sports ball", ["sports ball"]), ("sports", []),                    # "sport ball", of which "ball" fires
    ("men and women", ["person"]),                                       # men stays men and is missed
    ("vases", []), ("a vase", ["vase"]),                                 # vases become vas
    ("knives, buses and benches", ["knife", "bus", "bench"]),
    ("People with scissors on skis", ["person", "scissors", "skis"]),
    ("the dog's traffic lights", ["dog", "traffic light"]), ("CATS!", ["cat"]),
    ("a man and a woman", ["person", "person"]),
    ("a t-shirt", []), ("", []), ("a coffee table", ["dining table"]), ("cell phones", ["cell phone"]),
    # as NLTK splits: what has no space around it and is no punctuation mark of its own stays in one word
    ("a dog—cat", []), ("dog–cat", []), ("a dog.The cat", ["cat"]), ("a 'dog'", []), ("a dog_cat", []),
    ("a bird's-eye view", []), ("dog/cat", []), ("cat•dog", []), ("dog=cat", []), ("~dog", []),
    ("a dog.", ["dog"]), ("a dog. The cat.", ["dog", "cat"]), ('a "dog."', ["dog"]), ("a dog.)", ["dog"]),
    ("“dog”", ["dog"]),
    ("the dogs' cat", ["dog", "cat"]), ("a dog--cat", ["dog", "cat"]), ("dog...cat", ["dog", "cat"]),
    ("**dog**, [cat]; {cup}", ["dog", "cat", "cup"]), ("dog:cat", ["dog", "cat"]), ("dog:3", []),
    ("dog\u00a0cat", ["dog", "cat"]),
    ("the bird’s eye", ["bird"]), ("a dog!cat?", ["dog", "cat"]),
    # WordNet's irregular plurals
    ("children", ["person"]), ("geese", ["bird"]), ("two busses", ["bus"]), ("oxen and calves", ["cow", "cow"]),
    ("taxies", ["car"]), ("flamingoes", ["bird"]),
])
def test_coco_objects_in_text(text, expected):
    assert COCO.in_text(text) == expected


@pytest.mark.parametrize("objects, expected", [
    (["dog", "dogs", "dog"], ["dog"]),                       # once each
    (["man", "woman"], ["person", "person"]),                # two words of one category are two
    (["office chair"], []), (["wooden table"], ["dining table"]), (["the red car"], ["car"]),
    (["hot dog stand"], ["hot dog"]),                        # a double word: only it is kept
    (["man with dog"], ["person", "dog"]), ([], []), (["toilet", "seat"], ["toilet"]),
])
def test_coco_objects_in_an_extracted_list(objects, expected):
    assert COCO.in_list(objects) == expected


def test_official_synonym_format_takes_any_spacing():
    coco = CocoWords("person, girl,  boy\nbus,  mini bus , trolley\n")
    assert coco.category == {"person": "person", "girl": "person", "boy": "person", "bus": "bus", "mini bus": "bus",
                             "trolley": "bus"}
    assert coco.in_text("Mini buses and girls") == ["bus", "person"]


def test_lemma_takes_the_shortest_known_singular():
    assert lemma("buses", {"bus", "buse"}) == "bus"
    assert lemma("berries", {"berry"}) == "berry"
    assert lemma("wolves", {"wolf"}) == "wolf"
    assert lemma("cars", {"dog"}) == "cars"  # unknown words keep their plural
    assert lemma("men", {"man", "men"}) == "men"


@pytest.mark.parametrize("plural, singular", [
    ("grandchildren", "grandchild"), ("stepchildren", "stepchild"), ("pocketknives", "pocketknife"),
    ("penknives", "penknife"), ("busses", "bus"), ("buffaloes", "buffalo"), ("potatoes", "potato"),
    ("dominoes", "domino"), ("fieldmice", "fieldmouse"), ("dormice", "dormouse"), ("midwives", "midwife"), ("bookshelves", "bookshelf"), ("taxies", "taxi")])
def test_irregular_plurals_of_wordnet(plural, singular):
    assert lemma(plural, {singular, "dog"}) == singular


def test_nouns_that_wordnet_makes_other_words_of():
    # "leaves" is of "leaf", so it is no "leave"; these are plurals in AMBER's lists, and can never be met there
    for word in ("leaves", "sunglasses", "slippers", "chopsticks", "earrings", "vases"):
        assert lemma(word, {word, "leave", "vase"}) not in {word, "leave", "vase"}


# ----------------------------------------------------------------------------------------------------------------------
# AMBER, on the parts of the class that need no files


def boats():
    self = amber.AMBER.__new__(amber.AMBER)
    self.associated = {"boat": ["ship", "canoe"], "ship": ["vessel"], "dog": ["puppy"], "sky": [], "cat": []}
    self.vocabulary = set(self.associated).union(*self.associated.values())
    self.safe = {"sky"}
    return self


@pytest.mark.parametrize("noun, objects, expected", [
    ("ship", ["boat", "ship"], 0),      # an association of the boat: the ship itself is never covered
    ("vessel", ["boat", "ship"], 1), ("boat", ["boat", "ship"], 0), ("dog", ["boat"], None),
    ("boat", ["boat", "boat"], 0)])
def test_amber_finds_what_a_noun_stands_for(noun, objects, expected):
    assert amber.find(noun, objects, boats().associated) == expected


def test_amber_description_by_hand():
    total = Counter()
    gold = {"truth": ["boat", "ship"], "hallu": ["dog"]}
    text = "Ships; some ships and a canoe under the sky; puppies, a cat, a cat and a zebra."   # "Ships" is no ship
    nouns, _, score = boats().score_description(gold, text, total)
    assert nouns == ["ship", "canoe", "sky", "puppy", "cat", "cat"] and score == 0  # the zebra is in no list
    assert total == Counter(nouns=6, hallucinated=3, covered=1, truth=2, remembered=1, hallu=1, clean=0,
                            descriptions=1)


def test_amber_counts_start_at_a_thousandth_and_scores_at_zero():
    # metrics.txt: qa_correct_num=0.001, qa_correct_score=0
    assert amber.rate(0, 1) == 0.0 and amber.rate(1, 1) == 99.9 and amber.rate(0, 0) == 0.0 and amber.rate(2, 3) == 66.6
    # Positive is no: 2 true no, 1 false no, 1 missed, 1 true yes, 1 "other".
    rows = [("no", "no", 1.0)] * 2 + [("no", "yes", 0.0), ("yes", "no", 0.0), ("yes", "yes", 1.0),
                                      ("other", "yes", 0.0)]
    result = amber.score_choices(rows, nudge=0.0001)
    assert (result["accuracy"], result["precision"], result["recall"]) == (50.0, 66.6, 66.6)
    assert result["f1"] == round(2 * 0.666 * 0.666 / (0.666 + 0.666 + 0.0001) * 100, 1) == 66.6
    rows = [("no", "no", 1.0)] * 300 + [("yes", "no", 0.0)] * 600  # existence divides by a little more, which can show
    assert [amber.score_choices(rows, nudge)["f1"] for nudge in (0.0001, 0.001)] == [50.0, 49.9]


def test_amber_attribute_adds_up_three_counts():
    """(as_qa_correct_score + ...) / (as_qa_correct_num + an_qa_correct_num + aa_qa_correct_num), each from 0.001 on."""
    rows = [("no", "no", 1.0)]
    assert amber.score_choices(rows, 0.0001, counts=3)["accuracy"] == round(1 / 1.003 * 100, 1) == 99.7


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_average_is_the_mean_of_seven_columns():
    results = {"gqa": {"accuracy": 58.8}, "vizwiz": {"val_accuracy": 40.4}, "scienceqa": {"accuracy": 69.2},
               "textvqa": {"accuracy": 59.9},
               "mme": {"percentage": 69.2}, "mmbench": {"accuracy": 68.9}}
    assert "AVG" not in our_row(results)
    row = our_row(results | {"mmbench_cn": {"accuracy": 64.4}, "objhal": {"chair_s": 9.0, "chair_i": 5.0}})
    assert row["AVG"] == pytest.approx(61.5, abs=0.05)  # the paper prints 61.6 for this row
    assert row["ObjHal resp"] == 9.0
    table = markdown(row)
    assert "| **ours** | 58.80 | 40.40 |" in table and "| paper: 2B, Qwen-2-1.5B | 58.8 | 40.4 |" in table


def test_question_without_suffix():
    assert without_suffix("Is it?\nAnswer the question using a single word or phrase.") == "Is it?"
    assert without_suffix("Is it?") == "Is it?"
