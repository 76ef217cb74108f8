"""
The world of tools/study.py: `python -m tiny --preset=study`, or --preset=tuning.

It differs from the speedrun's where differences between arms could not be told apart there:

    noise        1 in 10 answers is wrong, in the teacher's rows and in the student's alike
    warm.json    250 scenes for a student that all arms of a seed start from
    arm.json     50 other scenes, 700 rows: what an arm is trained on. arm_half.json has the first 25 scenes of
                 them, arm_double.json 50 more, and arm_noise30.json the same questions with 3 wrong answers in 10
    teacher_shuffled.json   the teacher's rows with the pictures of others: a teacher that knows only text
    held_out.json           rows of test scenes without noise, to measure the KL to the teacher on
    pd.json      preference pairs whose chosen answer is true; `better_answers` makes the other kind, whose chosen
                 answer is the better one of two that a model has given
    bench/       1,000 captions, 3,400 yes/no questions, 300 questions of each other kind
    check/       900 yes/no questions about validation scenes, which tell when the warm student is trained enough

"study" asks about final scenes, "tuning" about validation scenes, so that no setting is chosen on what is reported.
"""
import random
from collections import Counter
from pathlib import Path

from engine.files import read_rows, write_lines
from tiny.benchmarks import write_benchmarks, write_pope
from tiny.language import (CAPTION_PROMPTS, QUESTIONS_PER_IMAGE, SHORT, caption, make_question, training_answer,
                           training_caption)
from tiny.rows import (caption_rows, chosen_rows, conversation, draw_scenes, preference_rows, question_rows,
                       scene_record, write_rows)
from tiny.scene import Scene

TEST_SPLIT = {"study": "final", "tuning": "validation"}
SIZES = {                # scenes
    "teacher": 6000, "warm": 250, "arm": 100, "held_out": 100, "preference": 4000,
    "pope": 320, "gqa": 600, "objhal": 1000, "check": 80,
    "unseen_pope": 200, "unseen_gqa": 300, "unseen_objhal": 300,
}
SMALLEST = 12            # scenes of each, whatever the scale: a batch of 32 captions needs so many
NOISE = 0.1
ROUNDS = 2               # of one caption and six questions per scene


def write_study_world(folder: Path, preset: str, seed: int, scale: float) -> dict[str, int]:
    """-> the number of scenes of each kind."""
    sizes = {name: max(SMALLEST, round(scale * n)) for name, n in SIZES.items()}
    training_scenes = write_study_rows(folder / "train", sizes, TEST_SPLIT[preset], seed)
    for style, prefix, bench in (("plain", "", "bench"), ("unseen", "unseen_", "bench_unseen")):
        counts = {name: sizes[prefix + name] for name in ("pope", "gqa", "objhal")}
        write_benchmarks(folder / bench, counts, seed, style, training_scenes, TEST_SPLIT[preset])
    write_pope(folder / "check/pope", sizes["check"], random.Random(f"{seed} check"), "plain", training_scenes, "validation")
    return sizes


def write_study_rows(folder: Path, sizes: dict[str, int], test_split: str, seed: int) -> list[Scene]:
    """-> the teacher's scenes, whose statistics POPE's questions need."""
    splits = {"teacher": "train", "warm": "train", "arm": "train", "held_out": test_split, "preference": "preference"}
    scenes = {name: draw_scenes(folder, name, split, sizes[name], seed) for name, split in splits.items()}
    rng = random.Random(f"{seed} answers")

    write_rows(folder / "align.json", caption_rows(scenes["warm"], rng))
    rows = caption_rows(scenes["teacher"], rng) + question_rows(scenes["teacher"], rng, NOISE)
    write_rows(folder / "teacher.json", rows)
    write_rows(folder / "teacher_shuffled.json", shuffle_pictures(rows, rng))

    write_rows(folder / "warm.json", scene_rows(scenes["warm"], NOISE, seed))
    images = list(scenes["arm"].items())
    half, all_rows = len(images) // 4, len(images) // 2
    for name, n, noise in (("arm_half", half, NOISE), ("arm", all_rows, NOISE), ("arm_double", len(images), NOISE),
                           ("arm_noise30", all_rows, 0.3)):
        write_rows(folder / f"{name}.json", scene_rows(dict(images[:n]), noise, seed))
    write_rows(folder / "held_out.json", scene_rows(scenes["held_out"], 0.0, seed))

    pairs = preference_rows(scenes["preference"], rng)
    write_rows(folder / "pd.json", pairs)
    write_rows(folder / "pd_chosen.json", chosen_rows(pairs))
    write_lines(folder / "scenes.jsonl", [scene_record(image, scene)
                                          for some in scenes.values() for image, scene in some.items()])
    return list(scenes["teacher"].values())


def scene_rows(scenes: dict[str, Scene], noise: float, seed: int) -> list[dict]:
    """Two rounds of a caption and six questions per scene.

    Each row has random numbers of its own. So a scene has the same rows in every file that it is in, and what is
    wrong at a low noise is wrong at a higher one too.
    """
    rows = []
    for image, scene in scenes.items():
        for i in range(ROUNDS):
            rng = random.Random(f"{seed} {image} {i}")
            rows.append({"id": f"{image} {i} caption", "image": image, "conversations": conversation(
                rng.choice(CAPTION_PROMPTS), training_caption(scene, rng))})
            for j in range(QUESTIONS_PER_IMAGE):
                rng = random.Random(f"{seed} {image} {i} {j}")
                kind, question, answer, about = make_question(scene, rng)
                answer = training_answer(scene, rng, kind, answer, about, noise)
                rows.append({"id": f"{image} {i} {j} {kind}", "image": image,
                             "conversations": conversation(f"{question}\n{SHORT}", answer)})
    return rows


def shuffle_pictures(rows: list[dict], rng: random.Random) -> list[dict]:
    """Every picture keeps its number of rows, but they are those of another one."""
    images = list(dict.fromkeys(row["image"] for row in rows))
    other = dict(zip(images, rng.sample(images, len(images))))
    return [row | {"image": other[row["image"]]} for row in rows]


# -----------------------------------------------------------------------------
# Preference pairs made by a model

def read_scenes(path: Path) -> dict[str, Scene]:
    """scenes.jsonl as {image: scene}."""
    return {row["image"]: Scene([tuple(item) for item in row["objects"]], row["label"] and tuple(row["label"]))
            for _, row in read_rows(path)}


def caption_mistakes(text: str, scene: Scene) -> int:
    """Phrases that the caption should not have, one said twice included, plus phrases that it lacks."""
    said, true = (Counter(words.removesuffix(".").strip() for words in some.split(" and "))
                  for some in (" ".join(text.split()), caption(scene)))
    return (said - true).total() + (true - said).total()


def better_answers(first: list[dict], second: list[dict], scenes: dict[str, Scene]) -> list[dict]:
    """Two sampled answers per row -> preference pairs of captions, the one with fewer mistakes chosen; ties dropped."""
    pairs = []
    for one, other in zip(first, second, strict=True):
        if SHORT in one["conversations"][0]["value"]:                # not a caption
            continue
        answers = [row["conversations"] for row in (one, other)]
        mistakes = [caption_mistakes(turns[1]["value"], scenes[one["image"]]) for turns in answers]
        if mistakes[0] == mistakes[1]:
            continue
        if mistakes[0] > mistakes[1]:
            answers.reverse()
        pairs.append({"id": one["id"], "image": one["image"], "chosen": answers[0], "rejected": answers[1]})
    return pairs
