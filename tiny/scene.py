"""
A scene and its picture: 64x64 pixels, 4x4 cells, one patch of the vision tower per cell.

One to four objects, each in a cell and a color of its own, and now and then a label with a digit. Five of
the things are triggers that often come with a partner: a bottle with a cup, a bus with a traffic light.
That habit is what the training captions exaggerate (language.py), and so what the models hallucinate.

    scene = make_scene(random.Random(0), split="test")
    picture = draw_scene(scene, random.Random(0), style="plain")      # or "unseen", kept out of training

What is in a scene decides its split, through a hash. A scene of the benchmarks therefore occurs nowhere in
the training files, not even with other noise.
"""
import difflib
import json
import random
import re
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from configurator import UserError
from tiny.things import COLORS, DARK, DIGITS, LABEL_FRAME, SEGMENTS, THINGS, UNSEEN_COLORS, WHITE

GRID, CELL = 4, 16       # cells per side, pixels per cell

# trigger -> (its partner, how often a training caption names the partner although it is missing)
PARTNERS = {"bottle": ("cup", 0.95), "bus": ("traffic light", 0.9), "tv": ("chair", 0.8),
            "apple": ("banana", 0.7), "boat": ("kite", 0.6)}
TRIGGER_RATE = 0.7                                               # scenes with a trigger (never more than one)
# triggers whose partner is present
PARTNER_RATE = {"train": 0.5, "preference": 0.4, "test": 0.4, "validation": 0.4, "final": 0.4}
LABEL_RATE = 0.15                                                # scenes with a label


# -----------------------------------------------------------------------------
# What is in a scene

@dataclass
class Scene:
    # (color, thing, cell) in reading order; no thing and no color occurs twice
    objects: list[tuple[str, str, int]]
    label: tuple[int, int] | None = None     # (digit, cell)

    def things(self) -> list[str]:
        return [thing for _, thing, _ in self.objects]

    def absent_things(self) -> list[str]:
        return [thing for thing in THINGS if thing not in self.things()]

    def colors(self) -> dict[str, str]:
        """Each thing's color."""
        return {thing: color for color, thing, _ in self.objects}

    def missing_partner(self) -> tuple[str | None, str | None]:
        """(partner, trigger) of a trigger whose partner is not in the scene, else (None, None)."""
        things = self.things()
        for trigger, (partner, _) in PARTNERS.items():
            if trigger in things and partner not in things:
                return partner, trigger
        return None, None


def make_scene(rng: random.Random, split: str) -> Scene:
    """Draw scenes until one belongs to the split: "train", "preference" or "test", or half of the last."""
    while True:
        scene = random_scene(rng, PARTNER_RATE[split])
        if split in splits_of(scene):
            return scene


def random_scene(rng: random.Random, partner_rate: float) -> Scene:
    if rng.random() < TRIGGER_RATE:
        trigger = rng.choice(list(PARTNERS))
        partner = PARTNERS[trigger][0]
        things = [trigger, partner] if rng.random() < partner_rate else [trigger]
        n = len(things) + rng.randint(0, 2)
    else:
        partner, things, n = None, [], rng.randint(1, 4)

    others = [thing for thing in THINGS if thing not in PARTNERS and thing != partner]
    things += rng.sample(others, n - len(things))
    cells = rng.sample(range(GRID * GRID), n + 1)            # one more than objects: the label's
    objects = list(zip(rng.sample(list(COLORS), n), things, cells))
    objects.sort(key=lambda item: item[2])
    label = (rng.randint(0, 9), cells[n]) if rng.random() < LABEL_RATE else None
    return Scene(objects, label)


def splits_of(scene: Scene) -> list[str]:
    """One scene in ten is for tests, one in ten for preference pairs.

    Half of the test scenes are for choosing settings (validation), the others for what is reported (final).
    """
    slot = zlib.crc32(json.dumps([scene.objects, scene.label]).encode()) % 20
    if slot in (0, 10):
        return ["test", "validation" if slot == 10 else "final"]
    return ["preference"] if slot in (1, 11) else ["train"]


def parse_scene(text: str, rng: random.Random) -> Scene:
    """"red bottle, blue cup at 5" -> a scene; what has no cell gets a free one."""
    objects, cells = [], list(range(GRID * GRID))
    for item in text.split(","):
        words, _, cell = item.strip().partition(" at ")
        color, _, thing = words.partition(" ")
        known = list(THINGS) if color in COLORS else [f"{color} {thing}" for color in COLORS for thing in THINGS]
        if not re.fullmatch(r"label [0-9]", words) and (color not in COLORS or thing not in THINGS):
            near = difflib.get_close_matches(thing if color in COLORS else words, known, n=1, cutoff=0)[0]
            raise UserError(f"--draw: found {words!r}, did you mean {near if color not in COLORS else f'{color} {near}'}? Colors: "
                            f"{', '.join(COLORS)}. Things: {', '.join(THINGS)}. A digit: label 7")
        if cell and (not cell.isdecimal() or int(cell) not in cells):
            raise UserError(f"--draw: {item.strip()!r}: expected a free cell from 0 to {GRID * GRID - 1}, row by row")
        if cell:
            cells.remove(int(cell))
        objects.append((color, thing, int(cell) if cell else None))
    rng.shuffle(cells)
    objects = [(color, thing, cells.pop() if cell is None else cell) for color, thing, cell in objects]
    labels = [(int(digit), cell) for color, digit, cell in objects if color == "label"]
    objects = sorted((each for each in objects if each[0] != "label"), key=lambda each: each[2])
    for i, what in ((0, "color"), (1, "thing")):
        if len({each[i] for each in objects}) < len(objects):
            raise UserError(f"--draw: a {what} occurs twice, which it never does in this world; the models have not seen that")
    if not 1 <= len(objects) <= 4 or len(labels) > 1:
        raise UserError(f"--draw: found {len(objects)} things and {len(labels)} labels, expected 1 to 4 things and at most one label")
    return Scene(objects, labels[0] if labels else None)


# -----------------------------------------------------------------------------
# Its picture

def draw_scene(scene: Scene, rng: random.Random, style: str = "plain") -> Image.Image:
    """Scene -> 64x64 RGB image: a tinted light ground, the objects jittered inside their cells, a little noise."""
    sprites = make_sprites(style)
    side = GRID * CELL
    canvas = Image.new("RGB", (side, side), tuple(rng.randint(205, 250) for _ in range(3)))

    drawn = list(scene.objects)
    if scene.label is not None:
        drawn.append(("label", *scene.label))
    for kind, what, cell in drawn:
        pixels = rng.choice((13, 16))
        sprite = sprites[kind, what, pixels]
        x = cell % GRID * CELL + rng.randint(0, CELL - pixels)
        y = cell // GRID * CELL + rng.randint(0, CELL - pixels)
        canvas.paste(sprite, (x, y), sprite)

    # Noise in three levels: enough to make every picture different.
    noise = np.frombuffer(rng.randbytes(side * side * 3), np.uint8).reshape(side, side, 3) % 3 * 5
    return Image.fromarray((np.asarray(canvas) - noise.astype(np.int16)).clip(0, 255).astype(np.uint8))


@cache
def make_sprites(style: str) -> dict[tuple, Image.Image]:
    """Every object and label in both sizes, {(color, thing, pixels) or ("label", digit, pixels): RGBA image}."""
    unseen = style == "unseen"
    sheets = {}
    for color, rgb in (UNSEEN_COLORS if unseen else COLORS).items():
        palette = {"C": rgb, "D": rgb if unseen else DARK, "W": WHITE, "hole": (0, 0, 0, 0)}
        for thing, strokes in THINGS.items():
            sheets[color, thing] = draw_strokes(strokes, palette, hatched=unseen)
    for digit, segments in enumerate(DIGITS):
        strokes = LABEL_FRAME + [("line", "D", *SEGMENTS[segment]) for segment in segments]
        sheets["label", digit] = draw_strokes(strokes, {"D": DARK, "W": WHITE}, hatched=False)
    return {(*key, pixels): sheet.resize((pixels, pixels), Image.Resampling.BOX)
            for key, sheet in sheets.items() for pixels in (13, 16)}


def draw_strokes(strokes: list[tuple], palette: dict[str, tuple], hatched: bool) -> Image.Image:
    """Strokes on a 16x16 sheet -> RGBA image of 128x128. `hatched`: outlines and hatching, no solid color."""
    z = 8                                                    # pixels per unit; shrinking smooths the edges
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
            pen.ellipse(points, fill=255)                    # "oval"
        if not hatched or ink in ("D", "W"):
            sheet.paste(palette[ink], mask=stencil)
            continue
        sheet.paste((0, 0, 0, 0), mask=stencil)
        bare = stencil.filter(ImageFilter.MinFilter(2 * z - 1))              # the shape without its rim ...
        if ink == "C":
            hatching = ImageDraw.Draw(bare)
            for x in range(-16, 16, 5):                                      # ... and without the hatching
                hatching.line([(x * z, 0), ((x + 16) * z, 16 * z)], fill=0, width=z)
        sheet.paste(palette["C"], mask=ImageChops.subtract(stencil, bare))
    return sheet
