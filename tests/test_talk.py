"""
Talking to the tiny models: a scene drawn from words, unknown words, short answers, a report of any run, --help everywhere.

    python -m pytest tests/test_talk.py
"""
import importlib
import json
import random
import sys

import pytest
from PIL import Image

import configurator
import sample
from benchmarks.common import SHORT
from benchmarks.paper import markdown, other_files
from configurator import UserError
from tiny import __main__ as tiny
from tiny.language import make_tokenizer
from tiny.scene import Scene, parse_scene


def test_a_scene_in_words():
    scene = parse_scene("red bottle, blue stop sign at 5, label 7 at 0", random.Random(0))
    assert sorted(each[:2] for each in scene.objects) == [("blue", "stop sign"), ("red", "bottle")]
    assert scene.colors() == {"bottle": "red", "stop sign": "blue"} and ("blue", "stop sign", 5) in scene.objects
    assert scene.label == (7, 0) and len({cell for _, _, cell in scene.objects} | {0}) == 3
    assert parse_scene("red cup at 3", random.Random(0)) == Scene([("red", "cup", 3)])
    assert parse_scene("red cup, blue bus", random.Random(1)) == parse_scene("red cup, blue bus", random.Random(1))


@pytest.mark.parametrize("text, says", [
    ("red bottel", "found 'red bottel', did you mean red bottle?"),
    ("rad bottle", "found 'rad bottle', did you mean red bottle?"),
    ("bottle", "found 'bottle'"), ("", "found ''"), ("red bottle at 16", "expected a free cell from 0 to 15"),
    ("red bottle at 3, blue cup at 3", "expected a free cell"), ("red bottle at top", "expected a free cell"),
    ("red bottle, red cup", "a color occurs twice"), ("red cup, blue cup", "a thing occurs twice"), ("label 7", "found 0 things"),
    ("red cup, blue bus, green tv, black kite, yellow ball", "found 5 things"), ("red cup, label 12", "found 'label 12'"),
])
def test_what_is_no_scene(text, says):
    with pytest.raises(UserError, match=says):
        parse_scene(text, random.Random(0))


def test_drawing_it(tmp_path, capsys):
    tiny.main(["--draw=red bottle at 0", f"--out={tmp_path / 'a.png'}"])
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}: a red bottle .\n"
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    cell = [picture.getpixel((x, y)) for x in range(16) for y in range(16)]
    assert picture.size == (64, 64) and sum(r > 150 and g < 90 and b < 90 for r, g, b in cell) > 30
    with pytest.raises(UserError, match="style=unseen: belongs to --draw"):
        tiny.main(["--style=unseen", f"--out_dir={tmp_path}"])


def test_unknown_words_are_named():
    assert sample.unknown_words("Is there a zebra in the fluffy zebra ?", make_tokenizer()) == ["fluffy", "zebra"] or \
           sample.unknown_words("Is there a zebra in the fluffy zebra ?", make_tokenizer()) == ["zebra", "fluffy"]
    assert sample.unknown_words("Is there a cup in the image?", make_tokenizer()) == []
    assert sample.unknown_words("Is there a cup in the image?\n" + SHORT, make_tokenizer()) == []


def test_qwens_tokenizer_knows_every_word():
    from test_data import qwen_tokenizer
    assert sample.unknown_words("ein Bücherregal, 書棚, \x00", qwen_tokenizer()) == []


def test_the_warning_and_the_short_answers(world, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "answer", lambda llava, conversation, *rest: asked.append(conversation[-1]["value"]) or "yes")
    sample.main([f"--model={world / 'dense'}", "--prompt=is there a zebra ?", "--short", "--device=cpu"])
    assert asked == [f"is there a zebra ?\n{SHORT}"]
    assert capsys.readouterr().err == "warning: the tokenizer does not know zebra: the model cannot read that\n"


# -----------------------------------------------------------------------------
# Reports

def judged(folder, name):
    kinds = {f"semantic: {kind}": {"accuracy": 90.0, "rows": 150} for kind in tiny_kinds()}
    results = {"pope": {"f1": 80.0, "yes_ratio": 50.0, "rows": 3408}, "gqa": {"by_type": kinds, "rows": 600},
               "objhal": {"chair_s": 3.0, "chair_i": 1.0, "recall": 95.0, "rows": 300}}
    (folder / "judged" / name).mkdir(parents=True)
    (folder / "judged" / name / "results.json").write_text(json.dumps(results))


def tiny_kinds():
    from tiny.benchmarks import GQA_TYPES
    return list(GQA_TYPES.values())


def test_the_report_takes_any_run(tmp_path, capsys):
    judged(tmp_path, "mine")
    tiny.main([f"--report={tmp_path}", "--models=mine"])
    assert "| mine | 80.0 | 50.0 | 90.0 | 90.0 | 90.0 | 90.0 | 90.0 | 3.0 | 1.0 | 95.0 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="run evaluate.py --model=.*other --data=data/tiny/bench --out_dir=.*judged/other --benchmark=pope"):
        tiny.main([f"--report={tmp_path}", "--models=mine,other"])


def test_other_questions_are_not_set_below_the_papers_numbers():
    row = {"GQA": 90.0}
    why = other_files({"gqa": {"rows": 600}})
    assert why.startswith("gqa has 600 questions here, and 12,578 in the official file")
    assert "paper" not in markdown(row, why).replace("the paper's numbers are not shown", "") and "| **ours** | 90.00 |" in markdown(row, why)
    assert markdown({}, other_files({"own": {"rows": 5}})) == "The paper has no numbers of own; ours are in results.json.\n"
    assert other_files({"gqa": {"rows": 12578}, "pope": {"rows": 8910}}) == "" and "| paper:" in markdown(row, "")


# -----------------------------------------------------------------------------
# --help

PROGRAMS = ["train", "evaluate", "sample", "tiny.__main__", "data", "tools.answer", "tools.bench", "tools.check", "tools.download",
            "tools.look", "tools.plan", "tools.study"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_prints_what_a_program_does_and_its_settings(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    configurator.run(module.main, module.__doc__, module.DEFAULTS)
    said = capsys.readouterr().out
    assert module.__doc__.strip().splitlines()[0] in said and all(f"--{key}=" in said for key in module.DEFAULTS)


# -----------------------------------------------------------------------------
# A row with its mask

def test_data_py_prints_a_row(world, capsys, tmp_path):
    import data
    row = json.loads((world / "rows.json").read_text())[1]
    data.main([f"{world / 'rows.json'}:1", f"--model={world / 'dense'}"])
    said = capsys.readouterr().out
    green = "".join(part.split("\033[0m")[0] for part in said.split("\033[32m")[1:])
    assert green.split() == [*row["conversations"][1]["value"].split(), "<|endoftext|>"]
    assert "<image>×4" in said and "4 of them of images" in said and f"images: {row['image']}" in said
    data.main([f"{world / 'pairs.json'}:0", f"--model={world / 'dense'}"])
    assert capsys.readouterr().out.count("supervised, in green") == 2
    wrong = tmp_path / "wrong.json"
    turn = {"from": "human", "value": "half a character: \ud800"}
    wrong.write_text(json.dumps([{"id": 7, "conversations": 3}, {"id": 8, "conversations": [turn, turn | {"from": "gpt"}]}]))
    for argv, says in [([], "name a row"), (["a.json"], "name a row"), ([f"{world / 'rows.json'}:99"], "has no row 99"),
                       (["a.json:" + "9" * 5000], "name a row"), (["a.json:" + "9" * 20], "name a row"),
                       ([f"{wrong}:0"], f"{wrong} row 0 id 7: "), ([f"{wrong}:1"], f"{wrong} row 1 id 8: .*surrogate")]:
        with pytest.raises(UserError, match=says):
            data.main([*argv, f"--model={world / 'dense'}"])
