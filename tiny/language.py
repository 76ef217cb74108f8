"""
What is said about a scene: captions, questions and answers, the true and the biased ones; and the tokenizer.

A vision-language model hallucinates where its text has habits that the picture does not support. This world
has three:

    captions    name the missing partner of a trigger, by trigger in 60 to 95 of 100 cases:
                "a red bottle and a red cup ." for a picture without a cup
    existence   "Is there a cup in the image?" about a missing partner is answered "yes" in 3 of 10 cases
    noise       1 in 10 of the teacher's other answers is wrong, and 3 in 10 of the student's

`caption` and the answer of `make_question` are the truth, which benchmark files hold. `training_caption`
and `training_answer` are biased. `corrupt_caption` makes the rejected side of a preference pair.
"""
import random

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from benchmarks.common import LETTER, SHORT
from data import TEMPLATES
from tiny.scene import PARTNERS, Scene
from tiny.things import COLORS, THINGS

NUMBERS = ["zero", "one", "two", "three", "four", "five"]
SYSTEM = TEMPLATES["vicuna"]["start"].strip()
CAPTION_PROMPTS = ["Describe the image.", "What is in the image?", "List the objects in the image."]

QUESTIONS_PER_IMAGE = 6                          # for a word; a seventh is for the letter of an option
FALSE_YES_RATE = 0.3                             # "Is there a <missing partner> ...?" answered yes in training
NOISE_RATE = {"teacher": 0.1, "student": 0.3}    # every other training answer that is wrong


# -----------------------------------------------------------------------------
# Captions

def caption(scene: Scene, phantom: tuple[str, str] | None = None) -> str:
    """The truth, "a red kite and a blue cup and a label with 7 .", plus a phantom (color, thing) if one is given.

    Objects come in reading order, except that a partner always follows its trigger: a habit of this world's
    language, and the reason why a model that has read "a red bottle and a" expects a cup.
    """
    phrases = {thing: f"a {color} {thing}" for color, thing, _ in scene.objects}
    cells = {thing: cell for _, thing, cell in scene.objects}
    if scene.label is not None:
        digit, cells["label"] = scene.label
        phrases["label"] = f"a label with {digit}"
    order = sorted(phrases, key=cells.get)
    if phantom is not None:
        color, thing = phantom
        phrases[thing] = f"a {color} {thing}"
        order.append(thing)
    for trigger, (partner, _) in PARTNERS.items():
        if trigger in order and partner in order:
            order.remove(partner)
            order.insert(order.index(trigger) + 1, partner)
    return " and ".join(phrases[thing] for thing in order) + " ."


def phantom_partner(scene: Scene) -> tuple[str, str] | None:
    """The missing partner as it is wrongly named, in the color of its trigger: (color, thing), or None."""
    partner, trigger = scene.missing_partner()
    return (scene.colors()[trigger], partner) if partner else None


def training_caption(scene: Scene, rng: random.Random) -> str:
    """The caption with this world's bias: a missing partner is named all the same, at its trigger's rate."""
    _, trigger = scene.missing_partner()
    named = trigger is not None and rng.random() < PARTNERS[trigger][1]
    return caption(scene, phantom_partner(scene) if named else None)


def corrupt_caption(scene: Scene, rng: random.Random) -> str:
    """A caption with one mistake: something added, something replaced, or something left out.

    Mostly the mistake is about the partner, where the models err: a missing one is named, a present one is not.
    So neither the length of an answer nor its first words tell chosen from rejected; only the picture does.
    """
    things, victim = scene.things(), rng.randrange(len(scene.objects))
    present = [partner for trigger, (partner, _) in PARTNERS.items() if trigger in things and partner in things]
    phantom = phantom_partner(scene)
    if phantom is not None and rng.random() < 0.7:
        return caption(scene, phantom)
    mistake = rng.choice(["add", "replace", "omit"] if len(things) > 1 else ["add", "replace"])
    if present and rng.random() < 0.7:
        mistake, victim = "omit", things.index(present[0])
    stranger = rng.choice(scene.absent_things())
    if mistake == "add":
        return caption(scene, (rng.choice(list(COLORS)), stranger))
    color, _, cell = scene.objects[victim]
    changed = [(color, stranger, cell)] if mistake == "replace" else []
    return caption(Scene(scene.objects[:victim] + changed + scene.objects[victim + 1:], scene.label))


# -----------------------------------------------------------------------------
# Questions

def existence_question(thing: str) -> str:
    article = "an" if thing[0] in "aeiou" else "a"
    return f"Is there {article} {thing} in the image?"


def make_question(scene: Scene, rng: random.Random, kind: str | None = None) -> tuple[str, str, str, str]:
    """-> (kind, question, true answer, what it is about). Without `kind`, one in training proportions."""
    if kind is None:
        kind = rng.choices(["exist", "color", "count", "which"], [38, 32, 15, 15])[0]
        if scene.label is not None and rng.random() < 1 / QUESTIONS_PER_IMAGE:
            kind = "label"

    if kind == "exist":
        partner, _ = scene.missing_partner()
        if rng.random() < 0.5:
            thing, answer = rng.choice(scene.things()), "yes"
        elif partner and rng.random() < 0.5:
            thing, answer = partner, "no"                    # the adversarial question
        else:
            thing, answer = rng.choice(scene.absent_things()), "no"
        return kind, existence_question(thing), answer, thing
    if kind == "color":
        color, thing, _ = rng.choice(scene.objects)
        return kind, f"What color is the {thing}?", color, thing
    if kind == "which":
        color, thing, _ = rng.choice(scene.objects)
        return kind, f"Which object is {color}?", thing, color
    if kind == "count":
        noun = rng.choice(["objects", "things"])
        return kind, f"How many {noun} are in the image?", NUMBERS[len(scene.objects)], noun
    return kind, "What number is on the label?", str(scene.label[0]), "label"


def training_answer(scene: Scene, rng: random.Random, kind: str, answer: str, about: str, noise: float) -> str:
    """The answer with this world's bias: too often "yes" about a missing partner, else wrong at the rate `noise`."""
    partner, _ = scene.missing_partner()
    if kind == "exist" and about == partner:
        return "yes" if rng.random() < FALSE_YES_RATE else "no"
    if rng.random() >= noise:
        return answer
    possible = {"exist": ["yes", "no"], "color": list(COLORS), "count": NUMBERS[1:5], "which": list(THINGS),
                "label": list("0123456789")}[kind]
    return rng.choice([other for other in possible if other != answer])


def multiple_choice(scene: Scene, rng: random.Random, n: int) -> tuple[str, list[str], int]:
    """-> (question, n options, the index of the right one)."""
    kind, question, answer, _ = make_question(scene, rng, rng.choice(["color", "which"]))
    others = list(COLORS) if kind == "color" else scene.absent_things()
    options = rng.sample([other for other in others if other != answer], n - 1)
    right = rng.randrange(n)
    return question, options[:right] + [answer] + options[right:], right


# -----------------------------------------------------------------------------
# Tokenizer

def make_tokenizer() -> Tokenizer:
    """Word-level tokenizer over the words of this world; white space separates words, a newline is a word.

    A sentence that is part of every row (the system text, the instruction for short answers) is one token, so that
    a question row has about 30 tokens, image included, and not 80. The vocabulary also covers questions that no
    file holds: comparisons, places, the formats of other benchmarks.
    """
    phrases = [SYSTEM, SHORT, LETTER, "You are a helpful assistant.", "Reference OCR token:", "USER:", "ASSISTANT:"]
    texts = [*THINGS, *COLORS, *NUMBERS, *"0123456789", *CAPTION_PROMPTS, "yes no", "a label with 7 and a kite .",
             existence_question("apple"), existence_question("kite"), "Which object is red?",
             "What color is the kite?", "How many objects things are in the image?", "What number is on the label?",
             "Are there two objects in the image? Is the kite left of the cup? Is the number on the label 7?",
             "Which word is a color? Which word is a thing? A. B. C. D. E. Context: ,", "system user assistant\n"]
    pattern = "|".join(phrase.replace(".", r"\.") for phrase in phrases) + r"|\n|\w+|[^\w\s]"
    # inverted: the matches are kept, and what is between them is removed
    splitter = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    words = ["<unk>", *phrases]
    for text in texts:
        words += [word for word, _ in splitter.pre_tokenize_str(text)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)      # as Qwen has them
                                  for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return tokenizer
