"""
The embedded world, checked against itself: the files must say what was drawn, at the rates that tiny/ promises.

    python -m pytest tests/test_tiny.py

One small world is made for all tests. Rates are measured on scenes alone, without drawing them: that gives enough.
"""
import base64
import errno
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer

import configurator
from configurator import UserError
from data import render, transform_image
from engine.index import InstructionData, PreferenceData
from model import Llava
from tiny import __main__ as tiny
from tiny.benchmarks import write_pope
from tiny.language import (FALSE_YES_RATE, LETTER, NOISE_RATE, NUMBERS, QUESTIONS_PER_IMAGE, SHORT, SYSTEM,
                           caption, existence_question, make_question, make_tokenizer, multiple_choice,
                           phantom_partner, training_answer, training_caption)
from tiny.pretrain import drill_row, make_sheet, make_vision
from tiny.report import MODELS
from tiny.rows import CAPTIONS_PER_IMAGE, conversation, preference_rows, question_rows
from tiny.scene import PARTNER_RATE, PARTNERS, TRIGGER_RATE, Scene, draw_scene, make_scene
from tiny.things import COCO_NAMES, THINGS

SCALE = 0.01                     # 1 % of every size in tiny.SIZES, but at least 4 scenes of each
N = {name: max(4, round(SCALE * size)) for name, size in tiny.SIZES.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for part in tiny.PARTS:
        tiny.make(part, folder, seed=1, scale=SCALE)
    return folder


def read_training(world, name):
    return json.loads((world / "train" / f"{name}.json").read_text())


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scenes_of(folder):
    """scenes.jsonl as {image: Scene}."""
    return {row["image"]: Scene([tuple(item) for item in row["objects"]], row["label"] and tuple(row["label"]))
            for row in read_jsonl(folder / "scenes.jsonl")}


def image_tokenizer():
    tokenizer = make_tokenizer()
    for token in ("<image>", "<pad>"):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return tokenizer


# -- training files --


def test_training_files_parse_and_fit(world):
    tokenizer = image_tokenizer()
    arguments = (world / "train" / "images", tokenizer, "vicuna", 16, 64, 128)
    per_scene = QUESTIONS_PER_IMAGE + 1 + CAPTIONS_PER_IMAGE        # 1: the one with options
    for name, rows in {"align": N["student"] * CAPTIONS_PER_IMAGE, "teacher": N["teacher"] * per_scene,
                       "d2d": N["student"] * per_scene, "d2s": N["student"] * per_scene}.items():
        data = InstructionData([(str(world / "train" / f"{name}.json"), 1.0)], *arguments)
        assert (len(data), data.notes) == (rows, [])
        asked = [row["conversations"][0]["value"] for row in read_training(world, name)]
        questions = [length for question, length in zip(asked, data.lengths) if SHORT in question]
        assert not questions or max(questions) <= 40         # "about 30 tokens", image included
    pairs = PreferenceData([(str(world / "train" / "pd.json"), 1.0)], *arguments)
    assert (len(pairs), pairs.notes) == (N["preference"], [])
    assert data[0]["images"][0].shape == (3, 64, 64) and pairs[0]["images"][0].shape == (3, 64, 64)


def test_stages_ask_differently_and_the_teacher_has_its_own_images(world):
    rows = {name: read_training(world, name) for name in ("teacher", "d2d", "d2s", "pd")}
    assert rows["d2d"] != rows["d2s"]
    images = {name: {row["image"] for row in some} for name, some in rows.items()}
    assert images["d2d"] == images["d2s"]
    assert not images["teacher"] & images["d2d"] and not images["pd"] & (images["teacher"] | images["d2d"])


def test_no_scene_of_one_split_is_in_another(world):
    content = {"train": set(), "preference": set(), "test": set()}
    for image, scene in scenes_of(world / "train").items():
        content["preference" if image.startswith("preference") else "train"].add(str((scene.objects, scene.label)))
    for folder in ("bench", "bench_unseen"):
        content["test"] |= {str((scene.objects, scene.label)) for scene in scenes_of(world / folder).values()}
    assert min(len(some) for some in content.values()) >= 15
    assert not content["train"] & content["test"]
    assert not content["train"] & content["preference"]
    assert not content["preference"] & content["test"]


def test_the_partner_is_present_at_the_promised_rate_and_missing_ones_are_named():
    rng = random.Random(0)
    for split, rate in PARTNER_RATE.items():
        scenes = [make_scene(rng, split) for _ in range(3000)]
        triggered = [scene for scene in scenes if set(scene.things()) & set(PARTNERS)]
        present = np.mean([scene.missing_partner()[0] is None for scene in triggered])
        assert abs(len(triggered) / 3000 - TRIGGER_RATE) < 0.04         # standard deviation 0.008
        assert abs(present - rate) < 0.05                                    # 0.011

    named, missing = Counter(), Counter()
    for _ in range(12000):
        scene = make_scene(rng, "train")
        partner, trigger = scene.missing_partner()
        text = training_caption(scene, rng)
        if partner is None:
            assert text == caption(scene)
            continue
        missing[trigger] += 1
        named[trigger] += f" {partner} " in text
    for trigger, (_, rate) in PARTNERS.items():
        assert missing[trigger] > 350
        assert abs(named[trigger] / missing[trigger] - rate) < 0.09          # standard deviation at most 0.027


@pytest.mark.parametrize("split", ["teacher", "student"])
def test_training_answers_are_wrong_at_the_promised_rates(split):
    rng, noise = random.Random(0), NOISE_RATE[split]
    asked, wrong, yes_truth = Counter(), Counter(), Counter()
    for _ in range(12000):
        scene = make_scene(rng, "train")
        kind, _, answer, about = make_question(scene, rng)
        group = "missing partner" if kind == "exist" and about == scene.missing_partner()[0] else kind
        asked[group] += 1
        wrong[group] += training_answer(scene, rng, kind, answer, about, noise) != answer
        if kind == "exist":
            yes_truth[answer] += 1
    for group, rate in {"missing partner": FALSE_YES_RATE, "exist": noise, "color": noise, "count": noise,
                        "which": noise}.items():
        assert asked[group] > 200
        assert abs(wrong[group] / asked[group] - rate) < 4 * (rate * (1 - rate) / asked[group]) ** 0.5
    assert abs(yes_truth["yes"] / yes_truth.total() - 0.5) < 0.03
    total = asked.total() - asked["label"]
    assert abs(yes_truth.total() / total - 0.38) < 0.03
    assert abs(asked["color"] / total - 0.32) < 0.03


def test_true_answers_follow_from_the_scene():
    scene = Scene([("red", "kite", 1), ("blue", "cup", 4), ("black", "bottle", 9)], (7, 12))
    assert caption(scene) == "a red kite and a black bottle and a blue cup and a label with 7 ."   # bottle, then cup
    rng, seen = random.Random(0), set()
    for _ in range(300):
        kind, question, answer, about = make_question(scene, rng)
        seen.add((question, answer))
    assert {pair for pair in seen if "Is there" not in pair[0]} == {
        ("What color is the kite?", "red"), ("What color is the cup?", "blue"),
        ("What color is the bottle?", "black"),
        ("How many objects are in the image?", "three"), ("How many things are in the image?", "three"),
        ("Which object is red?", "kite"), ("Which object is blue?", "cup"), ("Which object is black?", "bottle"),
        ("What number is on the label?", "7")}
    for question, answer in seen:
        if "Is there" in question:
            assert answer == ("yes" if any(thing in question for thing in scene.things()) else "no")
    without_cup = Scene([("red", "kite", 1), ("green", "bottle", 9)])
    assert caption(without_cup, phantom_partner(without_cup)) == "a red kite and a green bottle and a green cup ."


def test_preference_pairs_are_balanced_and_their_chosen_side_is_true(world):
    rng = random.Random(0)
    scenes = {f"{i}.png": make_scene(rng, "preference") for i in range(400)}
    rows = preference_rows(scenes, rng)
    yes_no, shifts = Counter(), Counter()
    for row in rows:
        scene, chosen, rejected = scenes[row["image"]], row["chosen"][1]["value"], row["rejected"][1]["value"]
        assert chosen != rejected
        if chosen in ("yes", "no"):
            assert {chosen, rejected} == {"yes", "no"}
            yes_no[chosen] += 1
            question = row["chosen"][0]["value"]
            present = any(existence_question(thing) in question for thing in scene.things())
            assert chosen == ("yes" if present else "no")
        else:
            assert chosen == caption(scene)
            shifts[np.sign(rejected.count(" and ") - chosen.count(" and "))] += 1
    assert min(yes_no["yes"], yes_no["no"]) >= 60 and abs(yes_no["yes"] - yes_no["no"]) <= 1
    assert min(shifts[-1], shifts[0], shifts[1]) > 30          # omitted, replaced, added: all occur


# -- pictures --


def test_pictures_show_their_objects_where_the_scene_says():
    """An empty cell is ground and noise; a cell with an object is not. The unseen style: the same in other pixels."""
    rng = random.Random(0)
    for i in range(40):
        scene = make_scene(rng, "test")
        pictures = [draw_scene(scene, random.Random(i), style) for style in ("plain", "unseen")]
        assert all(picture.size == (64, 64) and picture.mode == "RGB" for picture in pictures)
        used = {cell for _, _, cell in scene.objects} | ({scene.label[1]} if scene.label else set())
        for picture in pictures:
            cells = np.asarray(picture, np.int16).reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4)
            cells = cells.reshape(16, 256, 3)
            spread = (cells.max(1) - cells.min(1)).max(1)         # (16,) largest range of a color channel in it
            assert {cell for cell in range(16) if spread[cell] > 10} == used          # noise alone spreads by 10
        assert np.any(np.asarray(pictures[0]) != np.asarray(pictures[1]))


def test_the_same_seed_draws_the_same_world(world, tmp_path):
    tiny.make("world", tmp_path / "same", seed=1, scale=SCALE)
    tiny.make("world", tmp_path / "other", seed=2, scale=SCALE)
    files = sorted(path.relative_to(tmp_path / "same") for path in (tmp_path / "same").rglob("*")
                   if path.is_file() and path.name != "world.json")
    assert len(files) > 150
    assert all((tmp_path / "same" / name).read_bytes() == (world / name).read_bytes() for name in files)
    name = Path("train/teacher.json")
    assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


# -- benchmark files --


@pytest.mark.parametrize("folder", ["bench", "bench_unseen"])
def test_pope_is_balanced_true_and_joinable(world, folder):
    root, scenes = world / folder / "pope", scenes_of(world / folder)
    questions = {(row["question_id"], row["image"], row["text"].removesuffix(f"\n{SHORT}"), row["category"])
                 for row in read_jsonl(root / "llava_pope_test.jsonl")}
    count = 0
    for split in ("adversarial", "random", "popular"):
        labels = read_jsonl(root / "coco" / f"coco_pope_{split}.json")
        count += len(labels)
        assert Counter(row["label"] for row in labels)["yes"] * 2 == len(labels) > 0
        for row in labels:
            assert (row["question_id"], row["image"], row["text"], split) in questions
            things = scenes[f"pope/val2014/{row['image']}"].things()
            assert (row["text"] in [existence_question(thing) for thing in things]) == (row["label"] == "yes")
            assert (root / "val2014" / row["image"]).is_file()
    assert count == len(questions)


def test_adversarial_questions_ask_for_the_missing_partner_first(tmp_path):
    rng = random.Random(0)
    training = [make_scene(rng, "train") for _ in range(2000)]
    truths = write_pope(tmp_path / "pope", 40, rng, "plain", training)
    asked = {(row["image"], row["text"]) for row in read_jsonl(tmp_path / "pope/coco/coco_pope_adversarial.json")}
    missing = 0
    for row in truths:
        partner, _ = Scene([tuple(item) for item in row["objects"]]).missing_partner()
        if partner:
            missing += 1
            assert (Path(row["image"]).name, existence_question(partner)) in asked
    assert missing > 5


def test_objhal_annotations_agree_with_the_drawn_scenes(world):
    for folder in ("bench", "bench_unseen"):
        root, scenes = world / folder / "objhal", scenes_of(world / folder)
        instances = json.loads((root / "annotations/instances_val2014.json").read_text())
        captions = json.loads((root / "annotations/captions_val2014.json").read_text())["annotations"]
        names = {category["id"]: category["name"] for category in instances["categories"]}
        assert names[37] == "sports ball" and len(names) == 16
        rows = read_jsonl(root / "obj_halbench_300_with_image.jsonl")
        assert len(rows) == 4
        for row in rows:
            scene = scenes[f"objhal/{row['image_id']}"]
            found = {names[item["category_id"]] for item in instances["annotations"]
                     if item["image_id"] == row["image_id"]}
            assert found == {COCO_NAMES.get(thing, thing) for thing in scene.things()}
            told = [item["caption"] for item in captions if item["image_id"] == row["image_id"]]
            assert told == [caption(scene)]
            assert Image.open(io.BytesIO(base64.b64decode(row["image"]))).size == (64, 64)


def test_gqa_golds_are_true(world):
    scenes = scenes_of(world / "bench")
    golds = json.loads((world / "bench/gqa/data/testdev_balanced_questions.json").read_text())
    rows = read_jsonl(world / "bench/gqa/llava_gqa_testdev_balanced.jsonl")
    assert [row["question_id"] for row in rows] == list(golds) and len(rows) == 8
    for gold in golds.values():
        scene = scenes[f"gqa/data/images/{gold['imageId']}.png"]
        colors = {thing: color for color, thing, _ in scene.objects}
        things = [thing for thing in THINGS if f" {thing}" in gold["question"]]
        expected = {"exist": lambda: "yes" if things[0] in colors else "no", "color": lambda: colors[things[0]],
                    "count": lambda: NUMBERS[len(colors)],
                    "which": lambda: next(t for t, c in colors.items() if f" {c}?" in gold["question"])}
        assert gold["answer"] == expected[gold["types"]["detailed"]]()


def test_multiple_choice_and_ocr_rows_are_true_without_noise():
    rng = random.Random(0)
    scenes = {f"{i}.png": make_scene(rng, "train") for i in range(400)}
    for scene in scenes.values():
        question, options, right = multiple_choice(scene, rng, 4)
        assert len(set(options)) == 4
        pairs = [(color, thing) for color, thing, _ in scene.objects]
        true = [option for option in options if any(option in pair and other in question
                                                    for pair in pairs for other in pair if other != option)]
        assert true == [options[right]]                          # one truth, and no other option is true

    letters, tokens = Counter(), 0
    for row in question_rows(scenes, rng, noise=0):
        scene, question, answer = scenes[row["image"]], *(turn["value"] for turn in row["conversations"])
        if LETTER in question:
            options = dict(line.split(". ") for line in question.splitlines() if line[1:3] == ". ")
            assert any(options[answer] in (color, thing) for color, thing, _ in scene.objects)
            letters[answer] += 1
        elif "OCR" in question:
            assert answer == str(scene.label[0]) and f"Reference OCR token: {answer}\n" in question
            tokens += 1
    assert set(letters) == set("ABCD") and letters.total() == 400 and tokens > 10


# -- tokenizer and base checkpoints --


def test_tokenizer_round_trip_and_no_unknown_word(world):
    tokenizer = Tokenizer.from_file(str(world / "base/llm_teacher/tokenizer.json"))
    assert tokenizer.get_vocab_size() <= 126                  # <image> and <pad> fit below 128 rows
    assert tokenizer.decode(tokenizer.encode("a red kite and a blue cup .").ids) == "a red kite and a blue cup ."
    assert tokenizer.encode("zebra").tokens == ["<unk>"]
    row = f"{SYSTEM} USER: Is there an apple in the image?\n{SHORT} ASSISTANT: yes<|endoftext|>"
    assert tokenizer.encode(row).tokens == [
        SYSTEM, "USER:", "Is", "there", "an", "apple", "in", "the", "image", "?", "\n", SHORT, "ASSISTANT:", "yes",
        "<|endoftext|>"]
    full, texts = image_tokenizer(), []
    for name in ("teacher", "d2d", "d2s"):
        texts += [turn["value"] for row in read_training(world, name) for turn in row["conversations"]]
    texts += [turn["value"] for row in read_training(world, "pd") for turn in row["chosen"] + row["rejected"]]
    for folder in ("bench", "bench_unseen"):
        for path in (world / folder).rglob("llava_*.jsonl"):
            texts += [row["text"] for row in read_jsonl(path)]
    assert len(texts) > 1000
    assert not [text for text in texts if full.token_to_id("<unk>") in full.encode(text).ids]


def test_render_with_the_tiny_tokenizer():
    tokenizer = image_tokenizer()
    turns = conversation(f"Is there a kite in the image?\n{SHORT}", "yes")
    ids, mask = render(turns, tokenizer, image_tokens=16)
    assert [tokenizer.id_to_token(i) for i, m in zip(ids, mask) if m] == ["yes", "<|endoftext|>"]
    # system, USER:, 16 patches, newline, 8 words of the question, newline, instruction, ASSISTANT:, yes, end
    assert len(ids) == 1 + 1 + 16 + 1 + 8 + 1 + 1 + 1 + 1 + 1


def test_base_checkpoints_join_and_open_in_transformers(world):
    from transformers import CLIPVisionModel, PreTrainedTokenizerFast, Qwen2ForCausalLM
    llava = Llava.from_parts(world / "base/vision", world / "base/llm_student")
    assert llava.config.decoder.vocab_size == 128 and llava.config.decoder.n_embd == 64
    assert llava.config.image_tokens == 16
    assert llava.config.image_token_id == make_tokenizer().get_vocab_size()

    theirs, info = CLIPVisionModel.from_pretrained(world / "base/vision", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = transform_image(draw_scene(make_scene(random.Random(0), "test"), random.Random(0)), 64)[None]
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(llava.encode_images(pixels), expected, atol=1e-4, rtol=1e-4)

    theirs, info = Qwen2ForCausalLM.from_pretrained(world / "base/llm_student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([make_tokenizer().encode("a red kite and a blue cup .").ids])
    with torch.no_grad():
        torch.testing.assert_close(llava(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(world / "base/llm_student")
    assert tokenizer("a red kite")["input_ids"] == ids[0, :3].tolist()


def test_drills_and_sheets_say_what_is_in_the_scene():
    tokenizer = image_tokenizer()
    scene = Scene([("red", "kite", 1), ("blue", "traffic light", 4)], (7, 12))
    words = [[tokenizer.id_to_token(i) for i in cell if i >= 0] for cell in make_sheet(scene, tokenizer).tolist()]
    assert {cell: text for cell, text in enumerate(words) if text} == {
        1: ["red", "kite"], 4: ["blue", "traffic", "light"], 12: ["label", "7"]}
    colors = {"kite": "red", "traffic light": "blue"}
    for seed in range(10):
        ids, mask, _ = drill_row(scene, random.Random(seed), tokenizer)
        assert len(ids) == len(mask) and ids.count(tokenizer.token_to_id("<image>")) == 16
        said = tokenizer.decode(ids[18:]).removesuffix(" .").split(" . ")
        assert len(said) == 4
        for pair in said:
            things = [thing for thing in THINGS if thing in pair]
            assert len(things) == 1
            if things[0] in colors:
                assert colors[things[0]] in pair and "no" not in pair.split()
            else:
                assert pair == f"{things[0]} no"


def test_the_vision_tower_reads_what_is_in_a_cell(tmp_path):
    """A tenth of its training is enough to be far above guessing (17 kinds of things; 6 colors)."""
    accuracy = make_vision(tmp_path, seed=0, scale=0.15)["held-out accuracy"]
    assert accuracy["things"] > 50 and accuracy["colors"] > 80


# -- command line and report --


def test_finished_parts_stay_and_other_settings_are_refused(world, capsys):
    before = (world / "base/vision/model.safetensors").stat().st_mtime_ns
    arguments = [f"--out_dir={world}", "--part=vision", f"--scale={SCALE}"]
    tiny.main([*arguments, "--seed=1"])
    assert "made earlier" in capsys.readouterr().out
    assert (world / "base/vision/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError) as error:
        tiny.main([*arguments, "--seed=2"])
    assert all(part in str(error.value) for part in ("seed=1", "seed=2", "--out_dir"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag, needle", [("--scale=0", "scale is 0.0"), ("--scale=nan", "scale is nan"),
                                          ("--scale=1e308", "at most 10"), ("--out=scene", "ends in .png"),
                                          ("--out=", "ends in .png"), ("--out=a.png", "belongs to --draw"),
                                          ("--models=pd", "belongs to --report"),
                                          ("--part=moon", "part is 'moon'"), ("--seeed=1", "did you mean seed?")])
def test_bad_flags_end_with_one_line(flag, needle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny", f"--out_dir={tmp_path / 'new'}", flag])
    with pytest.raises(SystemExit) as stop:
        configurator.run(tiny.main, tiny.__doc__, tiny.DEFAULTS)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and needle in error
    assert not (tmp_path / "new").exists()


def test_a_drawing_replaces_a_file_and_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "link.png").symlink_to("mine.txt")
    (tmp_path / "folder.png").mkdir()
    arguments = ["--draw=red bus, label 7", "--seed=3"]
    for name in ("new/scene.png", "link.png"):
        tiny.main([*arguments, f"--out={tmp_path / name}"])
        assert Image.open(tmp_path / name).format == "PNG" and "a red bus and a label with 7" in capsys.readouterr().out
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="folder.png: is there already, and is not a file"):
        tiny.main([*arguments, f"--out={tmp_path / 'folder.png'}"])

    def fails(image, path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    before = (tmp_path / "link.png").read_bytes()
    monkeypatch.setattr(tiny, "save_png", fails)
    with pytest.raises(UserError, match="link.png: cannot be written"):
        tiny.main([*arguments, f"--out={tmp_path / 'link.png'}"])
    assert (tmp_path / "link.png").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("mode, ignored", [
    ("--draw=red bus", ["--part=world", "--scale=0.5", "--preset=study", "--out_dir=x", "--models=pd"]),
    ("--report=x", ["--draw=red bus", "--seed=5", "--part=world", "--scale=0.5", "--preset=study", "--out_dir=x",
                    "--out=a.png"])])
def test_what_would_be_ignored_is_said(mode, ignored):
    for flag in ignored:
        with pytest.raises(UserError, match=f"{flag[2:]}: belongs to .* here it would be ignored"):
            tiny.main([mode, flag])


def test_an_out_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*cannot be written"):
        tiny.main([f"--out_dir={tmp_path / 'file'}", "--part=world", f"--scale={SCALE}"])


def test_the_report_reads_what_evaluate_has_written(tmp_path, capsys):
    def kind(accuracy):
        return {"accuracy": accuracy, "rows": 15}

    kinds = {"semantic: obj": kind(90), "semantic: attr": kind(80), "semantic: global": kind(70),
             "semantic: cat": kind(61)}
    results = {"pope": {"f1": 98.76, "yes_ratio": 50, "rows": 3408},
               "gqa": {"accuracy": 1, "rows": 60, "by_type": kinds},
               "objhal": {"chair_s": 20, "chair_i": 10, "recall": 99.99, "rows": 30}}
    for folder in ("judged", "judged_unseen"):
        for name in MODELS:
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "results.json").write_text(json.dumps(results))
    (tmp_path / "times.txt").write_text("world 18\nvision 26\n")
    tiny.main([f"--report={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("| teacher | 98.8 | 50.0 | 90.0 | 80.0 | 70.0 | 61.0 | 75.2 | 20.0 | 10.0 | 100.0 |") == 2
    assert lines.count("| *questions* | 3,408 | 3,408 | 15 | 15 | 15 | 15 | 60 | 30 | 30 | 30 |") == 2
    assert "Seconds of each step, two at a time: world 18, vision 26" in lines

    results["objhal"]["chair_i"] = None                              # no caption names an object
    (tmp_path / "judged/teacher/results.json").write_text(json.dumps(results))
    tiny.main([f"--report={tmp_path}", "--models=teacher"])
    assert "| teacher | 98.8 | 50.0 | 90.0 | 80.0 | 70.0 | 61.0 | 75.2 | 20.0 | – | 100.0 |" in capsys.readouterr().out
    refused = {"rows": 30, "missing": 1, "refused": "1 of 30 questions have no answer"}
    for wrong in ({"pope": results["pope"]}, results | {"objhal": refused}, results | {"pope": []},
                  results | {"gqa": {"rows": 60, "by_type": {}}}, results | {"pope": results["pope"] | {"f1": "x"}}):
        (tmp_path / "judged/pd/results.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="judged/pd/results.json: lacks a number of pope, gqa or objhal"):
            tiny.main([f"--report={tmp_path}"])
        assert not capsys.readouterr().out                           # no half of a table
    (tmp_path / "judged/pd/results.json").write_text(json.dumps(results))

    (tmp_path / "judged_unseen/pd/results.json").unlink()
    with pytest.raises(UserError, match="judged_unseen/pd/results.json.*speedrun.sh"):
        tiny.main([f"--report={tmp_path}"])
