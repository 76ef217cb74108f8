"""
tools/look.py: the numbers behind each picture against values worked by hand, a picture in either format, and one line
for what cannot be drawn.

    python -m pytest tests/test_look.py
"""
import base64
import io
import json
import math
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configurator import UserError
from tools import look

ROOT = Path(__file__).resolve().parent.parent


def write_log(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def records(steps, **more):
    return [{"step": i, "loss": 4 / i, "ce": 2 / i, "lr": 1e-3, "grad_norm": 1.0, "tokens": 9, "tokens_per_s": 9,
             "seconds": 1.0, **more} for i in range(1, steps + 1)]


def sparse_records(steps):
    """Two layers of four experts; expert 3 of the second gets no text, and the first half of the run is other."""
    even, text = [0.25] * 4, [0.5, 0.3, 0.2, 0.0]
    rows = records(steps, balance=2.1, image_load=[even, even], text_load=[even, text])
    for row in rows[:steps // 2]:
        row["text_load"] = [[1.0, 0, 0, 0]] * 2
    return rows


@pytest.fixture
def tiny_world(tmp_path):
    """The files of a world with three held-out scenes: partner missing, partner there, no trigger."""
    def row(name, i, caption):
        return {"id": f"{name} caption {i}", "image": name, "conversations": [{"from": "human", "value": "<image>\n?"},
                                                                            {"from": "gpt", "value": caption}]}
    train = [row("a.png", 0, "a black kite and a red bottle ."), row("b.png", 0, "a blue apple ."),
             row("a.png", 1, "a black kite and a red bottle and a red cup ."),
             {"id": "a.png 0 exist", "image": "a.png", "conversations": [{"from": "gpt", "value": "yes"}]}]
    captions = ["a red cup and a green bottle .", "a blue apple .",
                "a green bottle and a purple ball and a label with 7 ."]
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    questions = [{"image_id": i, "image": image, "question": "Describe the image."} for i in range(3)]
    folder = tmp_path / "world"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "teacher.json").write_text(json.dumps(train))
    (folder / "bench" / "objhal" / "annotations").mkdir(parents=True)
    (folder / "bench" / "objhal" / "obj_halbench_300_with_image.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions))
    (folder / "bench" / "objhal" / "annotations" / "captions_val2014.json").write_text(json.dumps(
        {"annotations": [{"id": i, "image_id": i, "caption": caption} for i, caption in enumerate(captions)]}))
    return folder


# -----------------------------------------------------------------------------
# The numbers

def test_smoothing_is_the_mean_of_the_steps_around():
    values = np.random.default_rng(0).normal(size=103)
    expected = [values[max(0, i - 5):i + 6].mean() for i in range(103)]
    assert look.smooth(values) == pytest.approx(expected)
    assert look.smooth(values[:7]) == pytest.approx(values[:7])      # so short that there is nothing to smooth


def test_a_line_still_being_written_is_left_out(tmp_path):
    folder = write_log(tmp_path / "run", records(3))
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in look.read_log(folder)] == [1, 2, 3]
    assert look.read_log(f"{folder}/log.jsonl") == look.read_log(folder)


def test_a_part_that_is_the_whole_loss_gets_no_panel(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {name: write_log(tmp_path / name, rows) for name, rows in (("d2s", sparse_records(30)), ("sft", [
        record | {"ce": record["loss"]} for record in records(30)]))}
    titles = [[panel.get_title(loc="left") for panel in look.draw_curves(paths).axes if panel.get_visible()]
              for paths in ([runs["sft"]], [*runs.values()])]
    assert titles == [["loss"], ["loss", "cross-entropy (ce)", "balance loss, sum of layers"]]


def test_held_out_rows_are_dots_in_the_panel_of_their_loss(tmp_path):
    pytest.importorskip("matplotlib")
    rows = records(6)
    rows[2] |= {"val_loss": 3.0, "val_ce": 1.5}
    rows[5] |= {"val_loss": 2.0, "val_ce": 1.0}
    loss, ce = [panel for panel in look.draw_curves([write_log(tmp_path / "a", rows)]).axes if panel.get_visible()]
    for panel, values in ((loss, [3.0, 2.0]), (ce, [1.5, 1.0])):
        [dots] = [line for line in panel.get_lines() if line.get_marker() == "o"]
        assert dots.get_xdata().tolist() == [3, 6] and dots.get_ydata().tolist() == values


def test_runs_are_named_after_their_folders():
    assert look.run_names(["out/tiny/d2d/log.jsonl", "out/tiny/d2s/"]) == ["d2d", "d2s"]
    assert look.run_names(["a/d2d/log.jsonl", "b/d2d", "c/pd"]) == ["a/d2d", "b/d2d", "pd"]


def test_shares_are_the_mean_of_the_last_records(tmp_path):
    folder = write_log(tmp_path / "d2s", sparse_records(20))
    image, text = look.expert_shares(folder, last=10)
    assert image == pytest.approx(np.full((2, 4), 0.25)) and text[1] == pytest.approx([0.5, 0.3, 0.2, 0.0])
    image, text = look.expert_shares(folder, last=100)               # there are 20
    assert text[1] == pytest.approx([0.75, 0.15, 0.1, 0.0])


def test_a_scene_has_its_true_and_its_biased_caption(tiny_world):
    scene, = [scene for scene in look.read_scenes(tiny_world, count=4) if "a purple ball" in scene["true"]]
    assert scene["true"] == ["a green bottle", "a purple ball", "a label with 7"]
    assert scene["biased"] == ["a green bottle", "a green cup", "a purple ball", "a label with 7"]
    assert scene["image"].size == (64, 64) and scene["prompt"] == "Describe the image."


# -----------------------------------------------------------------------------
# The pictures

@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("command", ["curves", "experts", "scenes", "pipeline"])
def test_every_picture_in_either_format(tmp_path, tiny_world, world, capsys, command, kind):
    pytest.importorskip("matplotlib")
    runs = [write_log(tmp_path / "align", records(1)), write_log(tmp_path / "d2s", sparse_records(30))]
    paths = {"curves": runs, "experts": runs[1:], "pipeline": [],
             "scenes": [str(tiny_world), f"--models={world}/dense,{world}/sparse"]}[command]
    out = tmp_path / "new" / f"picture.{kind}"
    look.main([command, *paths, f"--out={out}"])
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    if kind == "png":
        picture = Image.open(out)
        assert picture.format == "PNG" and picture.width > 500 and out.stat().st_size < 150_000
    else:
        assert xml.etree.ElementTree.parse(out).getroot().tag.endswith("svg")
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_least_used_expert_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    look.main(["experts", write_log(tmp_path / "d2s", sparse_records(20)), "--last=10"])
    assert capsys.readouterr().out == ("d2s: the least used is expert 3 of sparse layer 2, with 0.0 % of the text "
                                       "tokens (even: 25.0 %)\nexperts.png\n")
    assert (tmp_path / "experts.png").is_file()


# -----------------------------------------------------------------------------
# What cannot be drawn

def fails(*argv):
    with pytest.raises(UserError) as error:
        look.main([str(arg) for arg in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_commands_and_endings():
    assert "one of curves, experts, scenes, pipeline" in fails("draw") and "one of curves" in fails()
    assert "log.jsonl of one or more runs" in fails("curves") and "nothing" in fails("pipeline", "out/d2s")
    assert "the folder of a tiny world" in fails("scenes", "a", "b")
    for name in ("a.jpg", "a", "a.png.gz"):
        assert "a name that ends in .png or .svg" in fails("pipeline", f"--out={name}")
    assert "did you mean out" in fails("pipeline", "--outt=a.png")
    assert "positive" in fails("experts", "out/d2s", "--last=0")
    for wrong in (["curves", "a", "--models=a"], ["curves", "a", "--last=3"], ["experts", "a", "--models=a"],
                  ["scenes", "a", "--last=3"], ["pipeline", "--last=3"]):
        assert "here it would be ignored" in fails(*wrong)


def test_logs_that_are_none(tmp_path):
    pytest.importorskip("matplotlib")
    assert "nowhere" in fails("curves", tmp_path / "nowhere") and "log.jsonl" in fails("curves", tmp_path)
    assert "is empty" in fails("curves", write_log(tmp_path / "empty", []))
    assert "without image_load" in fails("experts", write_log(tmp_path / "dense", records(3)))
    assert "record 2" in fails("curves", write_log(tmp_path / "other", [*records(1), {"step": 2}]))
    (tmp_path / "other" / "log.jsonl").write_text('{"step": 1, "loss": 1}\n{"step"\n')
    assert "log.jsonl line 2: malformed JSON" in fails("curves", tmp_path / "other")
    ragged = sparse_records(2)
    ragged[1]["image_load"] = [[0.5, 0.5]]
    assert "layers x experts" in fails("experts", write_log(tmp_path / "ragged", ragged))
    for load in ([], 0.5, [0.5, 0.5], [[[0.5]]], [[]], None, [[math.nan]], [[10**400]], "x"):
        rows = records(2, image_load=load, text_load=load)
        assert "layers x experts" in fails("experts", write_log(tmp_path / "shapes", rows))
    for number in (math.inf, -math.inf, math.nan, 10**400, 1e300, True, "1"):
        for wrong in ({"step": 2, "loss": number}, {"step": number, "loss": 1.0}):
            assert "two finite numbers" in fails("curves", write_log(tmp_path / "numbers", [*records(1), wrong]))
        look.draw_curves([write_log(tmp_path / "parts", [*records(3), *records(1, ce=number, val_loss=number)])])


def test_parts_that_the_first_record_lacks(tmp_path):
    """A first step on the student's own answers has no cross-entropy; what is measured of them is no loss."""
    pytest.importorskip("matplotlib")
    rows = records(6, kd=1.0, peak_gb=3.0)
    for row in rows[::2]:
        del row["ce"]
        row |= {"on_policy": 1, "answer_tokens": 4.5, "unfinished": 0, "generation_s": 0.1}
    figure = look.draw_curves([write_log(tmp_path / "run", rows)])
    assert {panel.get_title(loc="left") for panel in figure.axes if panel.get_visible()} == {
        "loss", look.TITLES["kd"], look.TITLES["ce"]}


def test_folders_that_are_no_tiny_world(tmp_path, tiny_world):
    pytest.importorskip("matplotlib")
    assert "captions_val2014.json: no such file" in fails("scenes", tmp_path)
    assert "nowhere" in fails("scenes", tiny_world, "--models=nowhere")
    rows = tiny_world / "bench" / "objhal" / "obj_halbench_300_with_image.jsonl"
    row = json.loads(rows.read_text().splitlines()[2])
    large = io.BytesIO()
    Image.new("1", (9_500, 9_500)).save(large, "PNG")
    for picture, says in (("@@@", "should be base64"), (base64.b64encode(b"no picture").decode(), "not a readable image"),
                          (base64.b64encode(large.getvalue()).decode(), "not a readable image"), (5, "expected str")):
        rows.write_text(json.dumps(row | {"image": picture}))
        assert says in (said := fails("scenes", tiny_world)) and "obj_halbench_300_with_image.jsonl line 1" in said
    rows.write_text('{"id": 7}')
    assert "other rows than those of a tiny world" in fails("scenes", tiny_world)
    rows.write_text("")
    assert "no scene with a missing partner" in fails("scenes", tiny_world)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)             # what import then raises is an ImportError
    out = tmp_path / "a.png"
    assert "pip install matplotlib" in fails("pipeline", f"--out={out}") and not out.exists()
    assert "pip install matplotlib" in fails("curves", write_log(tmp_path / "run", records(3)), f"--out={out}")


def test_the_user_sees_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "tools.look", "pipeline", "--out=a.jpg"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == 'error: --out: found "a.jpg", expected a name that ends in .png or .svg\n'
