"""
The training files of the embedded world, in LLaVA's formats.

    align.json               captions of the student's scenes: the adaptor's training
    teacher.json             captions and questions of the teacher's scenes
    d2d.json, d2s.json       captions and questions of the student's scenes, drawn twice
    pd.json                  preference pairs; chosen is true, rejected has one mistake
    pd_chosen.json           their chosen answers alone, the control of preference distillation
    scenes.jsonl             what each picture shows
    images/                  the pictures

A picture has 3 captions and 7 questions, one row each: a caption in the context would give the answers away.
A picture for preference pairs has one pair.
"""
import json
import random
from pathlib import Path

from PIL import Image

from engine.files import write_lines, write_text
from tiny.language import (CAPTION_PROMPTS, LETTER, NOISE_RATE, QUESTIONS_PER_IMAGE, SHORT, caption,
                           corrupt_caption, existence_question, make_question, multiple_choice, training_answer,
                           training_caption)
from tiny.scene import Scene, draw_scene, make_scene

CAPTIONS_PER_IMAGE = 3


def write_training_files(folder: Path, sizes: dict[str, int], seed: int) -> list[Scene]:
    """-> the teacher's scenes, whose statistics POPE's questions need."""
    splits = {name: draw_scenes(folder, name, split, sizes[name], seed) for name, split in
              (("teacher", "train"), ("student", "train"), ("preference", "preference"))}
    rng = random.Random(f"{seed} answers")
    write_rows(folder / "align.json", caption_rows(splits["student"], rng))
    for name, split in (("teacher", "teacher"), ("d2d", "student"), ("d2s", "student")):
        rows = caption_rows(splits[split], rng) + question_rows(splits[split], rng, NOISE_RATE[split])
        write_rows(folder / f"{name}.json", rows)
    pairs = preference_rows(splits["preference"], rng)
    write_rows(folder / "pd.json", pairs)
    write_rows(folder / "pd_chosen.json", chosen_rows(pairs))
    write_lines(folder / "scenes.jsonl", [scene_record(image, scene)
                                          for scenes in splits.values() for image, scene in scenes.items()])
    return list(splits["teacher"].values())


def draw_scenes(folder: Path, name: str, split: str, n: int, seed: int) -> dict[str, Scene]:
    """n scenes, with their pictures in images/NAME -> {image: scene}."""
    rng, scenes = random.Random(f"{seed} {name}"), {}
    for i in range(n):
        image, scene = f"{name}/{i:06d}.png", make_scene(rng, split)
        scenes[image] = scene
        save_png(draw_scene(scene, rng), folder / "images" / image)
    return scenes


# -----------------------------------------------------------------------------
# Rows

def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def caption_rows(scenes: dict[str, Scene], rng: random.Random) -> list[dict]:
    return [{"id": f"{image} caption {i}", "image": image,
             "conversations": conversation(rng.choice(CAPTION_PROMPTS), training_caption(scene, rng))}
            for image, scene in scenes.items() for i in range(CAPTIONS_PER_IMAGE)]


def question_rows(scenes: dict[str, Scene], rng: random.Random, noise: float) -> list[dict]:
    """Per scene, QUESTIONS_PER_IMAGE questions for a word and one for the letter of an option."""
    rows = []
    for image, scene in scenes.items():
        for i in range(QUESTIONS_PER_IMAGE):
            kind, question, answer, about = make_question(scene, rng)
            if kind == "label" and rng.random() < 0.5:       # half of them with what an OCR program has read
                question += f"\nReference OCR token: {scene.label[0]}"
            answer = training_answer(scene, rng, kind, answer, about, noise)
            rows.append({"id": f"{image} {i} {kind}", "image": image,
                         "conversations": conversation(f"{question}\n{SHORT}", answer)})

        question, options, right = multiple_choice(scene, rng, n=rng.randint(2, 4))
        if rng.random() < noise:
            right = (right + 1) % len(options)
        lines = [question] + [f"{letter}. {option}" for letter, option in zip("ABCD", options)] + [LETTER]
        rows.append({"id": f"{image} letter", "image": image,
                     "conversations": conversation("\n".join(lines), "ABCD"[right])})
    return rows


def preference_rows(scenes: dict[str, Scene], rng: random.Random) -> list[dict]:
    """Pairs: two thirds are captions, one third "Is there a ...?", with yes as often right as no."""
    rows = []
    for i, (image, scene) in enumerate(scenes.items()):
        if i % 3 < 2:
            question, chosen, rejected = rng.choice(CAPTION_PROMPTS), caption(scene), corrupt_caption(scene, rng)
        else:
            present = i % 2 == 0
            thing = rng.choice(scene.things() if present else scene.absent_things())
            question = f"{existence_question(thing)}\n{SHORT}"
            chosen, rejected = ("yes", "no") if present else ("no", "yes")
        rows.append({"id": image, "image": image, "chosen": conversation(question, chosen),
                     "rejected": conversation(question, rejected)})
    return rows


def chosen_rows(pairs: list[dict]) -> list[dict]:
    """The chosen answers as plain rows."""
    return [{"id": pair["id"], "image": pair["image"], "conversations": pair["chosen"]} for pair in pairs]


# -----------------------------------------------------------------------------
# Files

def write_rows(path: Path, rows: list[dict]) -> None:
    """A JSON list with one row per line, so that it can be read with `head`."""
    write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def save_png(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", compress_level=0)    # 2 times the bytes, half the time to read


def scene_record(image: str, scene: Scene) -> dict:
    """A row of scenes.jsonl: what an image shows."""
    return {"image": image, "objects": scene.objects, "label": scene.label}
