"""
Benchmark files of the embedded world, each in the layout of the benchmark that it imitates.

    pope/     yes/no questions about present and absent things
    gqa/      four kinds of questions with a one-word answer
    objhal/   "Describe the image.", with COCO's annotations to find hallucinated objects

They hold the truth, and triggers come without their partner more often than in training. `style` is the
drawing style. Each writer returns what its pictures show, for scenes.jsonl.
"""
import base64
import io
import json
import random
from collections import Counter
from pathlib import Path

from engine.files import write_lines, write_text
from tiny.language import CAPTION_PROMPTS, SHORT, caption, existence_question, make_question
from tiny.rows import save_png, scene_record
from tiny.scene import Scene, draw_scene, make_scene
from tiny.things import COCO_IDS, COCO_NAMES


def write_benchmarks(folder: Path, sizes: dict[str, int], seed: int, style: str,
                     training_scenes: list[Scene], split: str = "test") -> None:
    """`sizes`: the number of scenes per benchmark. `split`: where they come from, see scene.py."""
    pope, gqa, objhal = (random.Random(f"{seed} {style} {name}") for name in ("pope", "gqa", "objhal"))
    records = write_pope(folder / "pope", sizes["pope"], pope, style, training_scenes, split)
    records += write_gqa(folder / "gqa", sizes["gqa"], gqa, style, split)
    records += write_objhal(folder / "objhal", sizes["objhal"], objhal, style, split)
    write_lines(folder / "scenes.jsonl", records)


def write_pope(folder: Path, n: int, rng: random.Random, style: str, training_scenes: list[Scene],
               split: str = "test") -> list[dict]:
    """Yes/no questions about present and absent things, as many of each; three ways to choose the absent ones.

    random: any. popular: the most frequent in the training scenes. adversarial: those that occurred most often
    together with what is in the image, so first of all a missing partner.
    """
    frequency, together = Counter(), Counter()
    for scene in training_scenes:
        frequency.update(scene.things())
        together.update((a, b) for a in scene.things() for b in scene.things())

    records, rows = [], {"adversarial": [], "random": [], "popular": []}
    for i in range(n):
        scene, image = make_scene(rng, split), f"COCO_val2014_{i + 1:012d}.png"
        save_png(draw_scene(scene, rng, style), folder / "val2014" / image)
        records.append(scene_record(f"pope/val2014/{image}", scene))

        things, absent = scene.things(), scene.absent_things()
        present = rng.sample(things, min(2, len(things)))
        absent = rng.sample(absent, len(absent))
        popular = sorted(absent, key=lambda thing: -frequency[thing])
        adversarial = sorted(absent, key=lambda thing: -sum(together[thing, other] for other in things))
        for kind, candidates in (("random", absent), ("popular", popular), ("adversarial", adversarial)):
            for yes, no in zip(present, candidates):
                rows[kind] += [(image, yes, "yes"), (image, no, "no")]

    questions = []
    for (kind, asked), first_id in zip(rows.items(), (1, 10000001, 20000001)):
        labels = []
        for i, (image, thing, label) in enumerate(asked):
            row = {"question_id": first_id + i, "image": image, "text": existence_question(thing)}
            questions.append({**row, "text": f"{row['text']}\n{SHORT}", "category": kind})
            labels.append({**row, "label": label})
        write_lines(folder / f"coco/coco_pope_{kind}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", questions)
    return records


# our kind of question -> GQA's semantic type
GQA_TYPES = {"exist": "obj", "color": "attr", "count": "global", "which": "cat"}


def write_gqa(folder: Path, n: int, rng: random.Random, style: str, split: str = "test") -> list[dict]:
    """Two questions per image; the four kinds take turns."""
    records, questions, golds = [], [], {}
    for i in range(n):
        scene, name = make_scene(rng, split), f"n{i + 1:06d}"
        save_png(draw_scene(scene, rng, style), folder / f"data/images/{name}.png")
        records.append(scene_record(f"gqa/data/images/{name}.png", scene))
        for kind in (("exist", "color"), ("count", "which"))[i % 2]:
            _, question, answer, _ = make_question(scene, rng, kind)
            question_id = f"{20000001 + len(questions)}"
            questions.append({"question_id": question_id, "image": f"{name}.png", "text": f"{question}\n{SHORT}",
                              "category": "default"})
            golds[question_id] = {
                "question": question, "answer": answer, "imageId": name, "isBalanced": True,
                "types": {"structural": "verify" if kind == "exist" else "query", "detailed": kind,
                          "semantic": GQA_TYPES[kind]},
                "groups": {"global": kind, "local": None}, "semantic": [], "entailed": [], "fullAnswer": answer,
            }
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", questions)
    write_text(folder / "data/testdev_balanced_questions.json", json.dumps(golds))
    return records


def write_objhal(folder: Path, n: int, rng: random.Random, style: str, split: str = "test") -> list[dict]:
    """Describe-the-image requests with COCO's annotations: a category that is in neither is a hallucination."""
    records, questions, images, instances, captions = [], [], [], [], []
    for i in range(n):
        scene, image_id = make_scene(rng, split), i + 1
        png = io.BytesIO()
        draw_scene(scene, rng, style).save(png, "PNG")
        questions.append({"image_id": image_id, "image": base64.b64encode(png.getvalue()).decode(),
                          "question": CAPTION_PROMPTS[i % len(CAPTION_PROMPTS)]})
        records.append(scene_record(f"objhal/{image_id}", scene))
        images.append({"id": image_id, "file_name": f"COCO_val2014_{image_id:012d}.jpg"})
        instances += [{"id": len(instances) + j, "image_id": image_id, "category_id": COCO_IDS[thing]}
                      for j, thing in enumerate(scene.things())]
        captions.append({"id": i, "image_id": image_id, "caption": caption(scene)})
    write_lines(folder / "obj_halbench_300_with_image.jsonl", questions)

    categories = [{"id": coco_id, "name": COCO_NAMES.get(thing, thing)} for thing, coco_id in COCO_IDS.items()]
    annotations = {      # COCO's train half is empty here, but the scorer reads both
        "instances_val2014": {"images": images, "annotations": instances, "categories": categories},
        "captions_val2014": {"images": images, "annotations": captions},
        "instances_train2014": {"images": [], "annotations": [], "categories": categories},
        "captions_train2014": {"images": [], "annotations": []},
    }
    for name, content in annotations.items():
        write_text(folder / f"annotations/{name}.json", json.dumps(content))
    return records
