"""
The embedded world: everything the recipe needs, drawn and trained from nothing in a few minutes.

    python tiny.py --out_dir=data/tiny                       # all four parts, one after the other
    python tiny.py --out_dir=data/tiny --part=world          # or one part a process: none waits for another
                                                             # (world | vision | llm_teacher | llm_student)

LLaVA-MoD starts from a CLIP tower, two language models, millions of captioned images and ten benchmarks. This file makes
a miniature of each, in the same file formats, so that train.py and evaluate.py run on it without knowing that it is small.

    a scene   64x64 pixels, 4x4 cells, one patch of the vision tower per cell. One to four objects: 16 things that carry
              COCO names in 6 colours, a few strokes each. Sometimes a label with a digit on it.
    the bias  What makes a vision-language model hallucinate is text that goes beyond the picture. Five triggers (bottle,
              bus, tv, apple, boat) often come with a partner (cup, traffic light, ...). Where the partner is missing,
              the training captions name it all the same, more or less often by trigger, and the answer to "Is there a
              cup in the image?" is too often "yes". Besides, one answer in ten of the teacher's
              training rows is simply wrong, and three in ten of the student's, which has far fewer rows.
    the test  Benchmark files hold the truth, with the partner missing more often than in training. bench_unseen/ is the
              same in a drawing style (outlined and hatched, in other shades) that no model has been trained on.
    splits    What is in a scene decides, through a hash, whether it is for training, for preference pairs or for the
              benchmarks. So no benchmark scene was ever drawn for training, not even with other noise.

Order of the file: things and words -> a scene and its picture -> captions, questions, answers -> tokenizer -> training
files -> benchmark files -> the three base checkpoints -> the report of speedrun.sh -> command line.
"""
import argparse
import base64
import io
import json
import os
import random
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch import nn

from configurator import UserError
from data import TEMPLATES, pad_right, render, transform_image
from engine.files import write_text as write_file
from engine.hf import IMAGE_TOKEN, TOWERS, config_files, published_key, save_tensors
from model import DecoderConfig, Llava, LlavaConfig, VisionConfig

SIZES = {                # scenes per split
    "teacher": 6000,     # the teacher's fine-tuning
    "student": 500,      # alignment, d2d, d2s and sft all draw from these
    "preference": 4000,  # one pair each
    "pope": 320, "objhal": 300, "gqa": 300, "textvqa": 60, "mme": 30, "mmbench": 40, "scienceqa": 60,
    "unseen": 200,       # the drawing style kept out of training
}
QUESTIONS_PER_IMAGE, CAPTIONS_PER_IMAGE = 6, 3
GRID, CELL = 4, 16       # cells per side, pixels per cell

# ---------------------------------------------------------------------------------------------------------------------
# Things and words

# A thing is a list of strokes on a 16x16 sheet: (shape, ink, coordinates). Ink C is the object's colour, D dark, W white,
# and "hole" rubs out what lies below.
THINGS = {
    "bottle": [("box", "C", 6, 1, 10, 6), ("box", "C", 4, 5.5, 12, 16), ("box", "D", 6, 0, 10, 2),
               ("box", "W", 4, 9, 12, 12.5)],
    "bus": [("box", "C", 0, 3, 16, 13), ("box", "W", 1.5, 5, 5, 8.5), ("box", "W", 6.5, 5, 10, 8.5),
            ("box", "W", 11.5, 5, 15, 8.5), ("oval", "D", 2, 11, 6, 15.5), ("oval", "D", 10, 11, 14, 15.5)],
    "tv": [("line", "D", 4, 0, 8, 4, 12, 0), ("box", "C", 0, 3.5, 16, 14), ("box", "W", 2, 5.5, 11.5, 12),
           ("oval", "D", 12.5, 6, 14.5, 8), ("line", "D", 3, 15.4, 13, 15.4)],
    "apple": [("oval", "C", 1, 4, 9.5, 15.5), ("oval", "C", 6.5, 4, 15, 15.5), ("line", "D", 8, 5.5, 8.5, 0.5),
              ("oval", "D", 8.5, 0.5, 12.5, 3)],
    "boat": [("polygon", "C", 0, 10.5, 16, 10.5, 12.5, 15.5, 3.5, 15.5), ("line", "D", 7, 0, 7, 10.5),
             ("polygon", "C", 8, 1, 14.5, 9, 8, 9)],
    "cup": [("oval", "C", 8, 5, 16, 13), ("oval", "hole", 10, 7, 14, 11), ("polygon", "C", 1, 3, 12, 3, 10.5, 15.5, 2.5, 15.5),
            ("line", "D", 2, 4, 11, 4)],
    "traffic light": [("box", "C", 4, 0, 12, 16), ("oval", "W", 6, 1, 10, 5), ("oval", "W", 6, 6, 10, 10),
                      ("oval", "D", 6, 11, 10, 15)],
    "chair": [("box", "C", 2.5, 0, 5, 16), ("box", "C", 2.5, 7.5, 13.5, 10.5), ("box", "C", 11, 10, 13.5, 16),
              ("line", "D", 3, 2, 5, 2)],
    "banana": [("polygon", "C", 1, 3, 3.5, 2, 5, 7, 9, 10, 15, 10, 16, 12, 11, 14.5, 5, 13.5, 2, 9),
               ("line", "D", 1.5, 3, 3.5, 2), ("line", "D", 15, 10, 16, 12)],
    "kite": [("polygon", "C", 8, 0, 14, 5.5, 8, 12, 2, 5.5), ("line", "D", 2, 5.5, 14, 5.5),
             ("line", "C", 8, 12, 11, 13, 6, 14.5, 10, 16)],
    "clock": [("oval", "C", 0, 0, 16, 16), ("oval", "W", 2.5, 2.5, 13.5, 13.5), ("line", "D", 8, 4, 8, 8, 11.5, 9.5)],
    "umbrella": [("arch", "C", 0, 1, 16, 17), ("line", "D", 8, 9, 8, 14, 10, 15.4, 11.5, 14), ("line", "D", 8, 0, 8, 2)],
    "stop sign": [("line", "D", 8, 11, 8, 16), ("polygon", "C", 5, 0, 11, 0, 14, 3, 14, 9, 11, 12, 5, 12, 2, 9, 2, 3),
                  ("box", "W", 4, 4.5, 12, 7.5)],
    "ball": [("oval", "C", 1.5, 1.5, 14.5, 14.5), ("line", "W", 8, 2, 6.5, 5, 6.5, 11, 8, 14), ("line", "W", 2, 8, 14, 8)],
    "book": [("polygon", "C", 0, 3, 7.5, 5, 7.5, 15, 0, 13), ("polygon", "C", 16, 3, 8.5, 5, 8.5, 15, 16, 13),
             ("line", "W", 1.5, 6.5, 6, 7.7), ("line", "W", 10, 7.7, 14.5, 6.5), ("line", "W", 1.5, 9.5, 6, 10.7),
             ("line", "W", 10, 10.7, 14.5, 9.5)],
    "donut": [("oval", "C", 0.5, 2, 15.5, 15), ("oval", "hole", 5.5, 6.5, 10.5, 10.5), ("line", "D", 3, 7, 4, 9),
              ("line", "D", 11, 5, 12.5, 6), ("line", "D", 10, 12.5, 11.5, 11.5)],
}
COCO_IDS = {"bottle": 44, "bus": 6, "tv": 72, "apple": 53, "boat": 9, "cup": 47, "traffic light": 10, "chair": 62,
            "banana": 52, "kite": 38, "clock": 85, "umbrella": 28, "stop sign": 13, "ball": 37, "book": 84, "donut": 60}
COCO_NAMES = {"ball": "sports ball"}     # our word -> COCO's category, where the two differ

COLOURS = {"red": (214, 40, 40), "green": (34, 139, 60), "blue": (40, 80, 210),
           "yellow": (240, 196, 20), "purple": (140, 50, 170), "black": (38, 38, 42)}
UNSEEN_COLOURS = {"red": (190, 66, 84), "green": (78, 150, 72), "blue": (62, 110, 190),
                  "yellow": (212, 176, 56), "purple": (128, 72, 150), "black": (66, 66, 66)}
DARK, WHITE = (60, 52, 52), (250, 250, 250)
SEVEN_SEGMENTS = ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"]
SEGMENT_LINES = {"a": (5, 3, 11, 3), "b": (11, 3, 11, 8), "c": (11, 8, 11, 13), "d": (5, 13, 11, 13),
                 "e": (5, 8, 5, 13), "f": (5, 3, 5, 8), "g": (5, 8, 11, 8)}

# trigger -> (its partner, how often a training caption names the partner although it is not there)
PARTNERS = {"bottle": ("cup", 0.95), "bus": ("traffic light", 0.9), "tv": ("chair", 0.8),
            "apple": ("banana", 0.7), "boat": ("kite", 0.6)}
TRIGGER_RATE = 0.7                    # scenes with a trigger (never more than one)
PARTNER_RATE = {"train": 0.5, "preference": 0.4, "test": 0.4}    # how often the partner is really there
FALSE_YES_RATE = 0.3                  # "is there a <missing partner>?" answered yes in training
NOISE_RATE = {"teacher": 0.1, "student": 0.3}    # every other training answer that is wrong: the student's few rows are sloppy
LABEL_RATE = 0.15                     # scenes with a numbered label

NUMBERS = ["zero", "one", "two", "three", "four", "five"]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
SYSTEM = TEMPLATES["vicuna"]["start"].strip()
CAPTION_PROMPTS = ["Describe the image.", "What is in the image?", "List the objects in the image."]


def an(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


# ---------------------------------------------------------------------------------------------------------------------
# A scene and its picture


@dataclass
class Scene:
    objects: list        # [(colour, thing, cell)], in reading order; no thing and no colour occurs twice
    label: tuple = None  # (digit, cell)

    def things(self):
        return [thing for _, thing, _ in self.objects]

    def missing_partner(self):
        """The partner that a trigger calls for and that is not there, with its trigger; or (None, None)."""
        things = self.things()
        for trigger, (partner, _) in PARTNERS.items():
            if trigger in things and partner not in things:
                return partner, trigger
        return None, None


def split_of(scene):
    """What is in a scene decides its split: one in ten is for tests, one in ten for preference pairs."""
    slot = zlib.crc32(json.dumps([scene.objects, scene.label]).encode()) % 10
    return "test" if slot == 0 else "preference" if slot == 1 else "train"


def make_scene(rng, split):
    """Draw scenes until one belongs to the split ("train", "preference" or "test")."""
    while True:
        if rng.random() < TRIGGER_RATE:
            trigger = rng.choice(list(PARTNERS))
            partner = PARTNERS[trigger][0]
            things = [trigger, partner] if rng.random() < PARTNER_RATE[split] else [trigger]
            n = len(things) + rng.randint(0, 2)
        else:
            partner, things, n = None, [], rng.randint(1, 4)
        others = [thing for thing in THINGS if thing not in PARTNERS and thing != partner]
        things += rng.sample(others, n - len(things))
        cells = rng.sample(range(GRID * GRID), n + 1)
        objects = list(zip(rng.sample(list(COLOURS), n), things, cells))
        objects.sort(key=lambda item: item[2])
        label = (rng.randint(0, 9), cells[n]) if rng.random() < LABEL_RATE else None
        scene = Scene(objects, label)
        if split_of(scene) == split:
            return scene


def draw_strokes(strokes, palette, unseen):
    """Strokes on a 16x16 sheet -> RGBA image of 128x128. The unseen style outlines and hatches instead of filling."""
    z = 8                                                   # pixels per unit, shrunk later: smooth edges for free
    sheet = Image.new("RGBA", (16 * z, 16 * z))
    for shape, ink, *xy in strokes:
        points = [(x * z, y * z) for x, y in zip(xy[0::2], xy[1::2])]
        if shape == "line":
            ImageDraw.Draw(sheet).line(points, fill=palette[ink], width=int(1.5 * z), joint="curve")
            continue
        stencil = Image.new("L", sheet.size)
        pen = ImageDraw.Draw(stencil)
        if shape == "box":
            pen.rectangle(points, fill=255)
        elif shape == "polygon":
            pen.polygon(points, fill=255)
        elif shape == "arch":
            pen.pieslice(points, 180, 360, fill=255)
        else:
            pen.ellipse(points, fill=255)                   # "oval"
        if not unseen or ink in ("D", "W"):
            sheet.paste(palette[ink], mask=stencil)
            continue
        sheet.paste((0, 0, 0, 0), mask=stencil)
        bare = stencil.filter(ImageFilter.MinFilter(2 * z - 1))             # the shape without its rim ...
        if ink == "C":
            hatching = ImageDraw.Draw(bare)
            for x in range(-16, 16, 5):                                     # ... and without the hatching
                hatching.line([(x * z, 0), ((x + 16) * z, 16 * z)], fill=0, width=z)
        sheet.paste(palette["C"], mask=ImageChops.subtract(stencil, bare))
    return sheet


def make_sprites(style):
    """Every object in both sizes, ready to paste: {(colour, thing, pixels): RGBA image}; labels under their digit."""
    unseen = style == "unseen"
    sheets = {}
    for colour, rgb in (UNSEEN_COLOURS if unseen else COLOURS).items():
        for thing, strokes in THINGS.items():
            palette = {"C": rgb, "D": rgb if unseen else DARK, "W": WHITE, "hole": (0, 0, 0, 0)}
            sheets[colour, thing] = draw_strokes(strokes, palette, unseen)
    for digit, segments in enumerate(SEVEN_SEGMENTS):
        strokes = [("box", "D", 1, 0, 15, 16), ("box", "W", 2, 1, 14, 15)]
        strokes += [("line", "D", *SEGMENT_LINES[segment]) for segment in segments]
        sheets["label", digit] = draw_strokes(strokes, {"D": DARK, "W": WHITE}, unseen=False)
    return {(*key, pixels): sheet.resize((pixels, pixels), Image.Resampling.BOX)
            for key, sheet in sheets.items() for pixels in (13, 16)}


SPRITES = {}        # style -> sprites, filled at first use


def draw_scene(scene, rng, style="plain"):
    """Scene -> 64x64 RGB image: a tinted light ground, the objects jittered inside their cells, a little noise."""
    if style not in SPRITES:
        SPRITES[style] = make_sprites(style)
    side = GRID * CELL
    canvas = Image.new("RGB", (side, side), tuple(rng.randint(205, 250) for _ in range(3)))
    drawn = list(scene.objects)
    if scene.label is not None:
        drawn.append(("label", *scene.label))
    for kind, what, cell in drawn:
        pixels = rng.choice((13, 16))
        sprite = SPRITES[style][kind, what, pixels]
        x = cell % GRID * CELL + rng.randint(0, CELL - pixels)
        y = cell // GRID * CELL + rng.randint(0, CELL - pixels)
        canvas.paste(sprite, (x, y), sprite)
    # noise in three levels: enough to make every picture different, few enough for small PNG files
    noise = np.frombuffer(rng.randbytes(side * side * 3), np.uint8).reshape(side, side, 3) % 3 * 5
    return Image.fromarray((np.asarray(canvas) - noise.astype(np.int16)).clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Captions, questions, answers


def caption(scene, phantom=None):
    """The truth in words: "a red kite and a blue cup and a label with 7 .", plus a phantom (colour, thing) if one is given.

    Objects come in reading order, except that a partner always follows its trigger: a habit of this world's language, and
    the reason why one that has read "a red bottle and a" expects a cup.
    """
    phrases = {thing: f"a {colour} {thing}" for colour, thing, _ in scene.objects}
    cells = {thing: cell for _, thing, cell in scene.objects}
    if scene.label is not None:
        digit, cells["label"] = scene.label
        phrases["label"] = f"a label with {digit}"
    order = sorted(phrases, key=cells.get)
    if phantom is not None:
        colour, thing = phantom
        phrases[thing] = f"a {colour} {thing}"
        order.append(thing)
    for trigger, (partner, _) in PARTNERS.items():
        if trigger in order and partner in order:
            order.remove(partner)
            order.insert(order.index(trigger) + 1, partner)
    return " and ".join(phrases[thing] for thing in order) + " ."


def phantom_partner(scene):
    """The missing partner as it is wrongly named, in the colour of its trigger: (colour, thing), or None."""
    partner, trigger = scene.missing_partner()
    colours = {thing: colour for colour, thing, _ in scene.objects}
    return (colours[trigger], partner) if partner else None


def training_caption(scene, rng):
    """The caption as the biased annotators of this world write it: a missing partner may be named all the same."""
    _, trigger = scene.missing_partner()
    named = trigger is not None and rng.random() < PARTNERS[trigger][1]
    return caption(scene, phantom_partner(scene) if named else None)


def existence(thing):
    return f"Is there {an(thing)} in the image?"


def absent_things(scene):
    return [thing for thing in THINGS if thing not in scene.things()]


def ask(scene, rng, kind=None):
    """-> (kind, question, true answer, what the question is about). Kinds are drawn in training proportions if not given."""
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
            thing, answer = rng.choice(absent_things(scene)), "no"
        return kind, existence(thing), answer, thing
    if kind == "color":
        colour, thing, _ = rng.choice(scene.objects)
        return kind, f"What color is the {thing}?", colour, thing
    if kind == "which":
        colour, thing, _ = rng.choice(scene.objects)
        return kind, f"Which object is {colour}?", thing, colour
    if kind == "count":
        noun = rng.choice(["objects", "things"])
        return kind, f"How many {noun} are in the image?", NUMBERS[len(scene.objects)], noun
    return kind, "What number is on the label?", str(scene.label[0]), "label"


def training_answer(scene, rng, kind, answer, about, noise):
    """The answer as training files have it: noisy, and leaning towards "yes" for a missing partner."""
    partner, _ = scene.missing_partner()
    if kind == "exist" and about == partner:
        return "yes" if rng.random() < FALSE_YES_RATE else "no"
    if rng.random() >= noise:
        return answer
    others = {"exist": ["yes", "no"], "color": list(COLOURS), "count": NUMBERS[1:5], "which": list(THINGS),
              "label": list("0123456789")}[kind]
    return rng.choice([other for other in others if other != answer])


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def make_tokenizer():
    """Word-level tokenizer over the words of this world; white space separates and is dropped, a newline is a word.

    A sentence that stands in every row (the system text, the instruction for short answers) is one word, so that a
    question row is about 30 tokens long, image included, and not 80.
    """
    phrases = [SYSTEM, SHORT, LETTER, "You are a helpful assistant.", "Reference OCR token:", "USER:", "ASSISTANT:"]
    texts = [*THINGS, *COLOURS, *NUMBERS, *"0123456789", *CAPTION_PROMPTS, "yes no", "a label with 7 and a kite .",
             existence("apple"), existence("kite"), "Which object is red?", "What color is the kite?",
             "How many objects things are in the image?", "What number is on the label?",
             "Are there two objects in the image? Is the kite left of the cup? Is the number on the label 7?",
             "Which word is a color? Which word is a thing? A. B. C. D. E. Context: ,", "system user assistant\n"]
    pattern = "|".join(phrase.replace(".", r"\.") for phrase in phrases) + r"|\n|\w+|[^\w\s]"
    splitter = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)    # keep the matches, drop the rest
    words = ["<unk>", *phrases]
    for text in texts:
        words += [word for word, _ in splitter.pre_tokenize_str(text) if word not in words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])      # as Qwen has them
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Training files, in LLaVA's formats


def write_list(path, rows):
    """A JSON list with one row per line, so that a reader can look at it with `head`."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_png(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


def truth(name, scene):
    """A row of scenes.jsonl: what was really drawn, for whoever wants to score or to look."""
    return {"image": name, "objects": [list(item) for item in scene.objects], "label": scene.label and list(scene.label)}


def instruction(row_id, image, question, answer):
    return {"id": row_id, "image": image, "conversations": [{"from": "human", "value": f"<image>\n{question}"},
                                                            {"from": "gpt", "value": answer}]}


def caption_rows(scenes, rng):
    return [instruction(f"{name} caption {i}", name, rng.choice(CAPTION_PROMPTS), training_caption(scene, rng))
            for name, scene in scenes.items() for i in range(CAPTIONS_PER_IMAGE)]


def question_rows(scenes, rng, noise):
    """Per scene, QUESTIONS_PER_IMAGE questions for a word and one for the letter of an option."""
    rows = []
    for name, scene in scenes.items():
        for i in range(QUESTIONS_PER_IMAGE):
            kind, question, answer, about = ask(scene, rng)
            if kind == "label" and rng.random() < 0.5:       # half of them as TextVQA has them, with what an OCR program read
                question += f"\nReference OCR token: {scene.label[0]}"
            answer = training_answer(scene, rng, kind, answer, about, noise)
            rows.append(instruction(f"{name} {i} {kind}", name, f"{question}\n{SHORT}", answer))
        question, options, right = choices(scene, rng, rng.randint(2, 4))
        if rng.random() < noise:
            right = (right + 1) % len(options)
        rows.append(instruction(f"{name} letter", name, f"{with_options(question, options)}\n{LETTER}", "ABCD"[right]))
    return rows


def choices(scene, rng, n):
    """A multiple-choice question about a scene -> (question, n options, the number of the right one)."""
    kind, question, answer, _ = ask(scene, rng, rng.choice(["color", "which"]))
    others = {"color": list(COLOURS), "which": absent_things(scene)}[kind]
    options = rng.sample([other for other in others if other != answer], n - 1)
    right = rng.randrange(n)
    return question, options[:right] + [answer] + options[right:], right


def with_options(question, options):
    return "\n".join([question] + [f"{letter}. {option}" for letter, option in zip("ABCDE", options)])


def spoil_caption(scene, rng):
    """A caption with one thing wrong: something added, something replaced, or something left out.

    Mostly it is wrong about the partner, which is where the models err: a missing one is named, a present one is not. So
    neither the length of an answer nor its first words tell the good one from the bad one; only the picture does.
    """
    things, victim = scene.things(), rng.randrange(len(scene.objects))
    present = [partner for trigger, (partner, _) in PARTNERS.items() if trigger in things and partner in things]
    phantom = phantom_partner(scene)
    if phantom is not None and rng.random() < 0.7:
        return caption(scene, phantom)
    way = rng.choice(["add", "replace", "omit"] if len(things) > 1 else ["add", "replace"])
    if present and rng.random() < 0.7:
        way, victim = "omit", things.index(present[0])
    stranger = rng.choice(absent_things(scene))
    if way == "add":
        return caption(scene, (rng.choice(list(COLOURS)), stranger))
    colour, _, cell = scene.objects[victim]
    changed = [(colour, stranger, cell)] if way == "replace" else []
    return caption(Scene(scene.objects[:victim] + changed + scene.objects[victim + 1:], scene.label))


def preference_rows(scenes, rng):
    """Pairs: two thirds are captions, one third "Is there a ...?", with yes as often right as no."""
    rows = []
    for i, (name, scene) in enumerate(scenes.items()):
        if i % 3 < 2:
            question, chosen, rejected = rng.choice(CAPTION_PROMPTS), caption(scene), spoil_caption(scene, rng)
        else:
            present = i % 2 == 0
            thing = rng.choice(scene.things() if present else absent_things(scene))
            question = f"{existence(thing)}\n{SHORT}"
            chosen, rejected = ("yes", "no") if present else ("no", "yes")
        sides = {side: instruction("", "", question, answer)["conversations"]
                 for side, answer in (("chosen", chosen), ("rejected", rejected))}
        rows.append({"id": name, "image": name, **sides})
    return rows


def write_training(folder, sizes, seed):
    """-> the teacher's scenes, whose statistics the POPE file needs."""
    splits = {}
    for name, split in (("teacher", "train"), ("student", "train"), ("preference", "preference")):
        rng = random.Random(f"{seed} {name}")
        splits[name] = {}
        for i in range(sizes[name]):
            scene = make_scene(rng, split)
            splits[name][f"{name}/{i:06d}.png"] = scene
            save_png(draw_scene(scene, rng), folder / "images" / f"{name}/{i:06d}.png")
    rng = random.Random(f"{seed} answers")
    write_list(folder / "align.json", caption_rows(splits["student"], rng))
    for name, split in (("teacher", "teacher"), ("d2d", "student"), ("d2s", "student")):
        rows = caption_rows(splits[split], rng) + question_rows(splits[split], rng, NOISE_RATE[split])
        write_list(folder / f"{name}.json", rows)
    pairs = preference_rows(splits["preference"], rng)
    write_list(folder / "pd.json", pairs)
    # The control of preference distillation: the same chosen answers as plain instruction rows.
    write_list(folder / "pd_chosen.json", [{"id": pair["id"], "image": pair["image"], "conversations": pair["chosen"]}
                                           for pair in pairs])
    write_jsonl(folder / "scenes.jsonl", [truth(name, scene) for scenes in splits.values() for name, scene in scenes.items()])
    return list(splits["teacher"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark files, each in the layout of the benchmark that it imitates


def with_label(rng):
    while True:
        scene = make_scene(rng, "test")
        if scene.label is not None:
            return scene


def as_base64(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_pope(folder, n, rng, style, training_scenes):
    """Yes/no questions about present and absent things, as many of each; three ways to choose the absent ones.

    random: any. popular: the most frequent in the training scenes. adversarial: those that occurred most often together
    with what is in the image, so first of all a missing partner.
    """
    frequency = {thing: 0 for thing in THINGS}
    together = {(a, b): 0 for a in THINGS for b in THINGS}
    for scene in training_scenes:
        for a in scene.things():
            frequency[a] += 1
            for b in scene.things():
                together[a, b] += 1
    truths, rows = [], {"adversarial": [], "random": [], "popular": []}
    for i in range(n):
        scene, name = make_scene(rng, "test"), f"COCO_val2014_{i + 1:012d}.png"
        save_png(draw_scene(scene, rng, style), folder / "val2014" / name)
        truths.append(truth(f"pope/val2014/{name}", scene))
        present = rng.sample(scene.things(), min(2, len(scene.objects)))
        absent = rng.sample(absent_things(scene), len(absent_things(scene)))
        ranked = {"random": absent,
                  "popular": sorted(absent, key=lambda thing: -frequency[thing]),
                  "adversarial": sorted(absent, key=lambda thing: -sum(together[thing, other] for other in scene.things()))}
        for split, absent in ranked.items():
            for yes, no in zip(present, absent):
                rows[split] += [(name, yes, "yes"), (name, no, "no")]
    (folder / "coco").mkdir()
    questions = []
    for (split, split_rows), first_id in zip(rows.items(), (1, 10000001, 20000001)):
        labels = []
        for i, (name, thing, label) in enumerate(split_rows):
            row = {"question_id": first_id + i, "image": name, "text": existence(thing)}
            questions.append({**row, "text": f"{row['text']}\n{SHORT}", "category": split})
            labels.append({**row, "label": label})
        write_jsonl(folder / f"coco/coco_pope_{split}.json", labels)
    write_jsonl(folder / "llava_pope_test.jsonl", questions)
    return truths


def write_gqa(folder, n, rng, style, _):
    """Two questions per image; the four kinds come in turn."""
    truths, questions, golds = [], [], {}
    (folder / "data").mkdir(parents=True)
    for i in range(n):
        scene, name = make_scene(rng, "test"), f"n{i + 1:06d}"
        save_png(draw_scene(scene, rng, style), folder / f"data/images/{name}.png")
        truths.append(truth(f"gqa/data/images/{name}.png", scene))
        for kind in (("exist", "color"), ("count", "which"))[i % 2]:
            kind, question, answer, _ = ask(scene, rng, kind)
            question_id = f"{20000001 + len(questions)}"
            questions.append({"question_id": question_id, "image": f"{name}.png", "text": f"{question}\n{SHORT}",
                              "category": "default"})
            types = {"structural": "verify" if kind == "exist" else "query", "detailed": kind,
                     "semantic": {"exist": "obj", "color": "attr", "count": "global", "which": "cat"}[kind]}
            golds[question_id] = {"question": question, "answer": answer, "imageId": name, "isBalanced": True,
                                  "types": types, "groups": {"global": kind, "local": None}, "semantic": [],
                                  "entailed": [], "fullAnswer": answer}
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", questions)
    (folder / "data/testdev_balanced_questions.json").write_text(json.dumps(golds))
    return truths


def write_textvqa(folder, n, rng, style, _):
    """The number on the label. One time in ten the OCR program has read nothing."""
    truths, questions, golds = [], [], []
    for i in range(n):
        scene, name = with_label(rng), f"{i + 1:016x}"
        save_png(draw_scene(scene, rng, style), folder / f"train_images/{name}.png")
        truths.append(truth(f"textvqa/train_images/{name}.png", scene))
        question, answer = "What number is on the label?", str(scene.label[0])
        tokens = answer if rng.random() < 0.9 else ""
        questions.append({"question_id": name, "image": f"{name}.png", "category": "default",
                          "text": f"{question}\nReference OCR token: {tokens}\n{SHORT}"})
        golds.append({"question_id": 34602 + i, "image_id": name, "question": question.lower(), "answers": [answer] * 10,
                      "question_tokens": [], "image_width": GRID * CELL, "image_height": GRID * CELL, "set_name": "val"})
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", questions)
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": golds}))
    return truths


def mme_pair(category, scene, rng):
    """-> (a question whose answer is yes, one whose answer is no), or None if the scene does not allow any."""
    colour, thing, cell = rng.choice(scene.objects)
    n = len(scene.objects)
    if category == "existence":
        return existence(thing), existence(rng.choice(absent_things(scene)))
    if category == "count":
        wrong = rng.choice([number for number in range(2, 6) if number != n])
        return n > 1 and tuple(f"Are there {NUMBERS[number]} objects in the image?" for number in (n, wrong))
    if category == "color":
        return f"Is the {thing} {colour}?", f"Is the {thing} {rng.choice([c for c in COLOURS if c != colour])}?"
    if category == "position":
        right = [other for _, other, place in scene.objects if place % GRID > cell % GRID]
        return right and (f"Is the {thing} left of the {right[0]}?", f"Is the {right[0]} left of the {thing}?")
    digit = scene.label and scene.label[0]
    return scene.label and tuple(f"Is the number on the label {d}?" for d in (digit, (digit + rng.randint(1, 9)) % 10))


def write_mme(folder, n, rng, style, _):
    """Five of MME's fourteen categories; each image has one question with yes and one with no."""
    truths, questions = [], []
    for category in ("existence", "count", "position", "color", "OCR"):
        files = folder / "MME_Benchmark_release_version" / category
        for i in range(n):
            pair = None
            while not pair:
                scene = make_scene(rng, "test")
                pair = mme_pair(category, scene, rng)
            save_png(draw_scene(scene, rng, style), files / f"{i + 1:04d}.png")
            truths.append(truth(f"MME/MME_Benchmark_release_version/{category}/{i + 1:04d}.png", scene))
            lines = [f"{question} Please answer yes or no.\t{answer}\n" for question, answer in zip(pair, ("Yes", "No"))]
            (files / f"{i + 1:04d}.txt").write_text("".join(lines))
            name = f"{category}/{i + 1:04d}.png"
            questions += [{"question_id": name, "image": name, "text": f"{question}\n{SHORT}", "category": category}
                          for question in pair]
    write_jsonl(folder / "llava_mme.jsonl", questions)
    return truths


def write_mmbench(folder, n, rng, style, _):
    """Every question stands there once per option, turned round: right means right every time."""
    truths, lines = [], []
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
               "comment", "split"]
    folder.mkdir()
    for i in range(n):
        scene = make_scene(rng, "test")
        image = as_base64(draw_scene(scene, rng, style))
        truths.append(truth(f"mmbench/{i + 1}", scene))
        question, options, right = choices(scene, rng, 2 + i % 3)
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            row = {"index": i + 1 + turn * 1000000, "question": question, **dict(zip("ABCD", turned)),
                   "answer": "ABCD"[(right - turn) % len(options)], "category": "attribute_recognition", "image": image,
                   "source": "tiny", "l2-category": "finegrained_perception (instance-level)", "split": "dev"}
            lines.append([str(row.get(column, "")) for column in columns])
    lines.sort(key=lambda line: int(line[0]))
    text = "".join("\t".join(line) + "\n" for line in [columns, *lines])
    (folder / "mmbench_dev_20230712.tsv").write_text(text)
    return truths


def write_scienceqa(folder, n, rng, style, _):
    """Multiple choice; every third question comes without an image, about words instead."""
    truths, questions, problems = [], [], {}
    for i in range(n):
        question_id, has_image = f"{i + 1}", i % 3 < 2
        if has_image:
            scene = make_scene(rng, "test")
            save_png(draw_scene(scene, rng, style), folder / f"images/test/{question_id}/image.png")
            truths.append(truth(f"scienceqa/images/test/{question_id}/image.png", scene))
            question, options, right = choices(scene, rng, 2 + i % 4)
        else:
            colours = rng.random() < 0.5
            question = f"Which word is a {'color' if colours else 'thing'}?"
            options = [rng.choice(list(COLOURS if colours else THINGS))]
            options += rng.sample(list(THINGS if colours else COLOURS), 1 + i % 3)
            right = rng.randrange(len(options))
            options[0], options[right] = options[right], options[0]
        text = ("<image>\n" if has_image else "") + with_options(question, options)
        row = {"id": question_id, "conversations": [{"from": "human", "value": text},
                                                    {"from": "gpt", "value": "ABCDE"[right]}]}
        questions.append({**row, "image": f"{question_id}/image.png"} if has_image else row)
        problems[question_id] = {"question": question, "choices": options, "answer": right, "hint": "", "split": "test",
                                 "image": "image.png" if has_image else None, "lecture": "", "solution": ""}
    write_list(folder / "llava_test_CQM-A.json", questions)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return truths


def write_objhal(folder, n, rng, style, _):
    """Describe-the-image requests with the annotations of COCO: a category that is in neither is a hallucination."""
    truths, questions, images, instances, captions = [], [], [], [], []
    (folder / "annotations").mkdir(parents=True)
    for i in range(n):
        scene, image_id = make_scene(rng, "test"), i + 1
        questions.append({"image_id": image_id, "image": as_base64(draw_scene(scene, rng, style)),
                          "question": CAPTION_PROMPTS[i % len(CAPTION_PROMPTS)]})
        truths.append(truth(f"objhal/{image_id}", scene))
        images.append({"id": image_id, "file_name": f"COCO_val2014_{image_id:012d}.jpg"})
        instances += [{"id": len(instances) + j, "image_id": image_id, "category_id": COCO_IDS[thing]}
                      for j, thing in enumerate(scene.things())]
        captions.append({"id": i, "image_id": image_id, "caption": caption(scene)})
    categories = [{"id": coco_id, "name": COCO_NAMES.get(thing, thing)} for thing, coco_id in COCO_IDS.items()]
    write_jsonl(folder / "obj_halbench_300_with_image.jsonl", questions)
    for split, here in (("val", images), ("train", [])):
        files = {"instances": {"images": here, "annotations": instances if here else [], "categories": categories},
                 "captions": {"images": here, "annotations": captions if here else []}}
        for name, content in files.items():
            (folder / f"annotations/{name}_{split}2014.json").write_text(json.dumps(content))
    return truths


BENCHMARKS = {"pope": write_pope, "gqa": write_gqa, "textvqa": write_textvqa, "MME": write_mme, "mmbench": write_mmbench,
              "scienceqa": write_scienceqa, "objhal": write_objhal}


def write_benchmarks(folder, names, sizes, seed, style, training_scenes):
    truths = []
    for name in names:
        n = sizes["unseen" if style == "unseen" else name.lower()]
        truths += BENCHMARKS[name](folder / name, n, random.Random(f"{seed} {style} {name}"), style, training_scenes)
    write_jsonl(folder / "scenes.jsonl", truths)


def make_world(out_dir, seed, scale):
    sizes = {name: max(4, round(scale * n)) for name, n in SIZES.items()}
    beside = out_dir / "world.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    for name in ("train", "bench", "bench_unseen"):
        (beside / name).mkdir(parents=True)
    training_scenes = write_training(beside / "train", sizes, seed)
    write_benchmarks(beside / "bench", BENCHMARKS, sizes, seed, "plain", training_scenes)
    write_benchmarks(beside / "bench_unseen", ("pope", "gqa", "objhal"), sizes, seed, "unseen", training_scenes)
    for name in ("train", "bench", "bench_unseen"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
        os.replace(beside / name, out_dir / name)
    beside.rmdir()
    return {"scenes": sizes}


# ---------------------------------------------------------------------------------------------------------------------
# The base checkpoints: an eye and two language models, as Hugging Face folders

VISION = VisionConfig(image_size=GRID * CELL, patch_size=CELL, n_embd=128, n_layer=3, n_head=4, n_ffn=512)
WIDTHS = {"llm_teacher": 128, "llm_student": 64}
VISION_STEPS, VISION_BATCH, VISION_SCENES = 400, 48, 3000
DRILL_STEPS = {"llm_teacher": 200, "llm_student": 300}
LANGUAGE_STEPS = {"llm_teacher": 1350, "llm_student": 1800}        # drills included
LANGUAGE_BATCH = 16
CAPTION_SHARE = 0.5                   # of their rows, drills aside
CONTEXT_WEIGHT = 0.02                 # of a token that is not an answer, in the language models' loss

KINDS = ["nothing", *THINGS, "label"]            # what a cell shows ...
ATTRIBUTES = [*COLOURS, *range(10)]              # ... and in which colour, or with which digit


def blank_model(width, seed):
    """An untrained Llava of tiny size: its parts are trained and stored one by one."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    text = DecoderConfig(vocab_size=128, n_embd=width, n_layer=4, n_head=4, n_kv_head=2, n_ffn=width * 11 // 4,
                         rope_theta=100.0, tied=True, max_positions=512)
    torch.manual_seed(seed)
    llava = Llava(LlavaConfig(VISION, text, tokenizer.token_to_id(IMAGE_TOKEN), pad_token_id=None,
                              eos_token_id=tokenizer.token_to_id("<|endoftext|>"), template="vicuna"), tokenizer)
    for name, parameter in llava.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 if name.startswith("vision") else 0.05)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return llava


def optimise(parameters, loss_at, steps, learning_rate):
    """AdamW with a short warm-up and a straight way down over the last third."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 20, 1, 3 * (steps - step) / steps)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def save_base(llava, tower, folder):
    """One tower under its published names, with the config.json that belongs to it."""
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    outer = TOWERS[tower][0].split(".")[0] + "."                # "vision_tower." or "language_model."
    tensors = {published_key(tower, name).removeprefix(outer): parameter.detach()
               for name, parameter in getattr(llava, tower).named_parameters()}
    save_tensors(tensors, beside)
    key, architecture = {"vision": ("vision_config", "CLIPVisionModel"), "decoder": ("text_config", "Qwen2ForCausalLM")}[tower]
    config = config_files(llava, torch.float32)["config.json"][key]
    write_file(beside / "config.json", json.dumps({"architectures": [architecture], "dtype": "float32", **config}, indent=2))
    if tower == "decoder":
        write_file(beside / "tokenizer.json", make_tokenizer().to_str(pretty=True))    # without <image>: from_parts adds it
        words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}   # words, not Qwen2's byte pairs
        write_file(beside / "tokenizer_config.json", json.dumps(words, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


# -- the eye --


def seen_scenes(rng, n, split):
    """n pictures with what is in each of their cells: (n, 3, S, S), kinds (n, P), attributes (n, P), -100 for none."""
    pixels, kinds, attributes = [], torch.zeros(n, VISION.patches, dtype=torch.long), torch.full((n, VISION.patches), -100)
    for i in range(n):
        scene = make_scene(rng, split)
        pixels.append(transform_image(draw_scene(scene, rng), VISION.image_size))
        for colour, thing, cell in scene.objects:
            kinds[i, cell], attributes[i, cell] = KINDS.index(thing), ATTRIBUTES.index(colour)
        if scene.label is not None:
            digit, cell = scene.label
            kinds[i, cell], attributes[i, cell] = KINDS.index("label"), ATTRIBUTES.index(digit)
    return torch.stack(pixels), kinds, attributes


def make_vision(out_dir, seed, scale):
    """A small CLIP tower that can tell things and colours apart, in place of CLIP's 400 million captioned images.

    CLIP pulls an image towards the vector of its caption. Here every cell is pulled towards the vector of its thing plus
    that of its colour, where "vectors of words" are fixed orthogonal codes. The patch features are then read by nothing but
    inner products, which is what makes them easy to translate for the adaptor. We train the features that LLaVA uses,
    those before the last block; the last block stays as it was drawn, since nobody will ever run it.
    """
    llava, rng = blank_model(64, seed), random.Random(f"{seed} vision")
    pixels, kinds, attributes = seen_scenes(rng, max(VISION_BATCH, round(scale * VISION_SCENES)), "train")
    length = 8                                               # of a code; two of them added give features of variance 1
    codes = length * torch.linalg.qr(torch.randn(VISION.n_embd, len(KINDS) + len(ATTRIBUTES)))[0].T
    weight = torch.ones(len(KINDS))
    weight[0] = 0.1                                          # most cells are empty

    def scores(pixels):
        features = llava.vision(pixels)                      # (B, P, Dv)
        return features, (features @ codes.T / length).split([len(KINDS), len(ATTRIBUTES)], dim=-1)

    def loss_at(step):
        rows = torch.randint(len(pixels), (VISION_BATCH,))
        features, (kind, attribute) = scores(pixels[rows])
        return (F.cross_entropy(kind.flatten(0, 1), kinds[rows].flatten(), weight=weight)
                + F.cross_entropy(attribute.flatten(0, 1), attributes[rows].flatten())
                + 0.02 * features.pow(2).mean())             # nothing in the features but the codes

    optimise(llava.vision.parameters(), loss_at, max(2, round(scale * VISION_STEPS)), 1e-3)
    measured = {}
    pixels, kinds, attributes = seen_scenes(rng, 300, "test")
    with torch.no_grad():
        _, (kind, attribute) = scores(pixels)
    thing, label = (kinds > 0) & (kinds < len(KINDS) - 1), kinds == len(KINDS) - 1
    right = attribute.argmax(-1) == attributes
    for name, hits in (("cells", kind.argmax(-1) == kinds), ("things", (kind.argmax(-1) == kinds)[thing]),
                       ("colours", right[thing]), ("digits", right[label])):
        measured[name] = round(100 * hits.float().mean().item(), 2)
    save_base(llava, "vision", out_dir / "base" / "vision")
    return {"held-out accuracy": measured}


# -- the language models --
#
# A real language model has learned from trillions of words to look things up in its context. A tiny one must learn that
# too before it meets an image, or it never finds out what "yes" depends on. It learns from scenes in words: a sheet of
# 4x4 cells takes the image's place in the conversation, and the words of one object ("red kite") lie on top of each other
# in one cell, their embeddings added. Nothing is false in these texts; noise and prior come with the images later.
#
# Questions alone teach this slowly, because the answer stands far from the word that it depends on. So the first steps are
# drills, "kite red . bus no . blue cup .": look up the word just said. Once that works, questions take a few hundred steps.


def sheet(scene, tokenizer):
    """The words of each cell, (P, 3) ids, -1 where there is no word."""
    words = torch.full((GRID * GRID, 3), -1)
    texts = [(cell, f"{colour} {thing}") for colour, thing, cell in scene.objects]
    if scene.label is not None:
        texts.append((scene.label[1], f"label {scene.label[0]}"))
    for cell, text in texts:
        ids = tokenizer.encode(text).ids
        words[cell, :len(ids)] = torch.tensor(ids)
    return words


def drill_row(scene, rng, tokenizer):
    """-> (ids, mask, sheet). A thing is answered by its colour or by "no", a colour by its thing."""
    ids = tokenizer.encode(f"{SYSTEM} USER: {IMAGE_TOKEN * VISION.patches}").ids
    mask = [0] * len(ids)
    colours = {thing: colour for colour, thing, _ in scene.objects}
    things = scene.things() + rng.sample(absent_things(scene), len(scene.objects))
    rng.shuffle(things)
    for thing in things:
        colour = colours.get(thing, "no")
        if thing in colours and rng.random() < 0.5:
            said, answer = colour, thing
        else:
            said, answer = thing, colour
        for text, learned in ((said, 0), (answer, 1), (".", 0)):
            new = tokenizer.encode(text).ids
            ids, mask = ids + new, mask + [learned] * len(new)
    return ids, mask, sheet(scene, tokenizer)


def text_row(scene, rng, tokenizer, kind=None):
    """-> (ids, mask, sheet). A question of one kind, or the caption, in the very form that image rows have."""
    if kind == "caption" or (kind is None and rng.random() < CAPTION_SHARE):
        question, answer = rng.choice(CAPTION_PROMPTS), caption(scene)
    else:
        kinds = ["exist", "color", "count", "which"] + ["label"] * (scene.label is not None)       # evenly, here
        _, question, answer, _ = ask(scene, rng, kind or rng.choice(kinds))
        question += f"\n{SHORT}"
    turns = instruction("", "", question, answer)["conversations"]
    return *render(turns, tokenizer, image_tokens=VISION.patches), sheet(scene, tokenizer)


def stack_rows(rows):
    ids, masks, sheets = zip(*rows)
    return pad_right(ids, 0), pad_right(masks, -1), torch.stack(sheets)        # -1: padding


def read_sheets(llava, ids, sheets):
    """(B, T) ids and (B, P, 3) words -> logits (B, T, V)."""
    words = llava.decoder.embedding(sheets.clamp(min=0)) * (sheets >= 0)[..., None]        # (B, P, 3, D)
    x = llava.decoder.embedding(ids)                                                       # (B, T, D)
    x = x.masked_scatter((ids == llava.config.image_token_id)[:, :, None], words.sum(2))
    return llava.decoder.head(llava.decoder(x)[0])


def make_language_model(part, out_dir, seed, scale):
    """Pretrain one of the two language models on scenes in words."""
    llava, rng = blank_model(WIDTHS[part], seed), random.Random(f"{seed} {part}")
    tokenizer = llava.tokenizer
    drills, steps = round(scale * DRILL_STEPS[part]), max(2, round(scale * LANGUAGE_STEPS[part]))

    def loss_at(step):
        drill = [step < drills or rng.random() < 0.15 for _ in range(LANGUAGE_BATCH)]
        ids, mask, sheets = stack_rows([(drill_row if d else text_row)(make_scene(rng, "train"), rng, tokenizer) for d in drill])
        logits, targets, mask = read_sheets(llava, ids, sheets)[:, :-1], ids[:, 1:], mask[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return ((mask == 1) * losses + CONTEXT_WEIGHT * (mask == 0) * losses).sum() / (mask == 1).sum()

    optimise(llava.decoder.parameters(), loss_at, steps, 1.5e-3)
    measured = {}
    for kind in ("exist", "color", "count", "which", "caption"):
        rows = [text_row(make_scene(rng, "test"), rng, tokenizer, kind) for _ in range(200)]
        ids, mask, sheets = stack_rows(rows)
        with torch.no_grad():
            guesses = read_sheets(llava, ids, sheets)[:, :-1].argmax(-1)
        right = (guesses == ids[:, 1:]) | (mask[:, 1:] != 1)
        measured[kind] = round(100 * right.all(1).float().mean().item(), 1)
    save_base(llava, "decoder", out_dir / "base" / part)
    return {"held-out accuracy": measured}


# ---------------------------------------------------------------------------------------------------------------------
# The report: what evaluate.py has measured, side by side

MODELS = {"teacher": "teacher", "d2d": "student after d2d", "d2s": "student after d2s", "pd": "student after pd",
          "chosen_only": "control: pd replaced by cross-entropy on the chosen", "sft": "control: sft, dense",
          "sft_sparse": "control: sft, then sparse without a teacher"}
QUESTION_KINDS = {"existence": "obj", "colour": "attr", "count": "global", "which": "cat"}     # GQA's name of each


def report(out_dir):
    """Print two tables of every judged model under out_dir and the seconds of every step."""
    def results_of(judged, name):
        path = out_dir / judged / name / "results.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; run speedrun.sh, which judges every model")
        return json.loads(path.read_text())

    columns = ["POPE F1", "yes %", *QUESTION_KINDS, "mean of 4", "halluc. resp.", "halluc. ment.", "coverage"]
    for judged, title in (("judged", "Held-out scenes"),
                          ("judged_unseen", "Held-out scenes in a drawing style never trained on")):
        print(f"\n{title}\n\n| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        for name, words in MODELS.items():
            results = results_of(judged, name)
            pope, gqa, objhal = results["pope"], results["gqa"], results["objhal"]
            kinds = [gqa["by_type"][f"semantic: {kind}"] for kind in QUESTION_KINDS.values()]
            accuracy = [kind["accuracy"] for kind in kinds]
            numbers = [pope["f1"], pope["yes_ratio"], *accuracy, sum(accuracy) / len(accuracy),
                       objhal["chair_s"], objhal["chair_i"], objhal["recall"]]
            print(f"| {words} | {' | '.join(f'{number:.1f}' for number in numbers)} |")
        rows = [pope["rows"]] * 2 + [kind["rows"] for kind in kinds] + [gqa["rows"]] + [objhal["rows"]] * 3
        print(f"| *questions* | {' | '.join(f'{n:,}' for n in rows)} |")

    others = {"textvqa": "accuracy", "mme": "perception", "mmbench": "accuracy", "scienceqa": "accuracy"}
    print(f"\nOther formats, on held-out scenes\n\n| model | {' | '.join(others)} |\n|{'---|' * (len(others) + 1)}")
    for name, words in MODELS.items():
        results = results_of("judged", name)
        print(f"| {words} | {' | '.join(f'{results[other][key]:.1f}' for other, key in others.items())} |")
    print(f"| *questions* | {' | '.join(str(results[other]['rows']) for other in others)} |")

    times = [line.split() for line in (out_dir / "times.txt").read_text().splitlines()]
    print("\nSeconds of each step, two at a time: " + ", ".join(f"{name} {seconds}" for name, seconds in times))
    print("POPE's truth is 50 % yes. Hallucination: % of captions, and of things named, that are not in the scene. Coverage: "
          "% of the scene's things that its caption names.")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

PARTS = ("world", "vision", "llm_teacher", "llm_student")


def make(part, out_dir, seed=0, scale=1.0):
    """Make one part, unless it has been made. out_dir/<part>.json, written last, says how, how long and how good."""
    record, settings = out_dir / f"{part}.json", {"seed": seed, "scale": scale}
    if record.is_file():
        found = json.loads(record.read_text())
        for key, value in settings.items():
            if found.get(key) != value:
                raise UserError(f"{record}: {part} was made with {key}={found.get(key)}, now {key}={value} is asked for; "
                                f"delete {out_dir} or choose another --out_dir")
        print(f"{part}: made earlier, nothing to do")
        return found
    out_dir.mkdir(parents=True, exist_ok=True)
    start = time.time()
    if part == "world":
        result = make_world(out_dir, seed, scale)
    elif part == "vision":
        result = make_vision(out_dir, seed, scale)
    else:
        result = make_language_model(part, out_dir, seed, scale)
    result = {"part": part, **settings, **result, "seconds": round(time.time() - start, 1)}
    write_file(record, json.dumps(result, indent=2))
    print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in result.items() if key != "part"))
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the embedded world.", allow_abbrev=False)
    parser.add_argument("--out_dir", default="data/tiny")
    parser.add_argument("--part", default="all", choices=["all", *PARTS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1: fewer scenes and steps, for a quick look")
    parser.add_argument("--report", metavar="DIR", help="print what speedrun.sh has measured there, and make nothing")
    parser.error = lambda message: parser.exit(2, f"tiny.py: {message}\n")        # one line, without the usage
    args = parser.parse_args(argv)
    try:
        if args.report:
            report(Path(args.report))
            return 0
        if not 0 < args.scale < float("inf"):
            raise UserError(f"--scale={args.scale}, expected a number above 0")
        for part in PARTS if args.part == "all" else [args.part]:
            make(part, Path(args.out_dir), args.seed, args.scale)
    except (UserError, OSError) as error:
        print(f"tiny.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
