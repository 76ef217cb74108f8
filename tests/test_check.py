"""
Wrong rows: tools/check.py finds all of them in one pass, skip_bad_rows trains without them, and the shapes of other tools'
files are read.

    python -m pytest tests/test_check.py
"""
import codecs
import json

import numpy as np
import pytest

import train
from configurator import Stopped, UserError
from engine.index import InstructionData, PreferenceData
from engine.rows import llava_row, parse_instruction, parse_pair
from model import Llava
from test_data import noise, turns
from test_train import flags, records
from tools import check
from tools.check import kind_of

# A wrong row, or a line that is no JSON, and what is said about it.
FAULTS = [
    ({"id": 1}, 'no "conversations", found the keys ["id"]'),
    ({"conversations": []}, "found [] as a conversation, expected a list of at least one turn"),
    ({"conversations": "what ?"}, 'found "what ?" as a conversation'),
    ({"conversations": [{"from": "human"}]}, 'turn 0 is {"from": "human"}, expected {"from": "human", "value": "some text"}'),
    ({"conversations": [{"from": "human", "value": 5}]}, "turn 0 is"),
    ({"conversations": turns("a", "b")[1:]}, 'turn 0 is from "gpt", expected "human": turns alternate human, gpt, human, ...; put a '
                                             "question in front of it"),
    ({"conversations": [{"from": "system", "value": "be brief"}, *turns("a", "b")]},
     'turn 0 is from "system", expected "human": the template has its own system text'),
    ({"conversations": turns("a") + turns("b")}, 'turn 1 is from "human", expected "gpt"'),
    ({"image": "gone.png", "conversations": turns("<image>\na", "b")}, "gone.png' does not exist; check image_dir and the name"),
    ({"image": "ocr_vqa/1.jpg", "conversations": turns("<image>\na", "b")}, "does not exist; check image_dir and the name (there is 1.gif)"),
    ({"image": "sub", "conversations": turns("<image>\na", "b")}, "sub' does not exist as a file"),
    ({"conversations": turns("<image>\na", "b")}, "1 <image> in the text but 0 images in the row"),
    ({"image": ["a.png", "a.png"], "conversations": turns("<image>\na", "b")}, "1 <image> in the text but 2 images in the row"),
    ({"image_file": "a.png", "conversations": turns("a", "b")}, '"image_file" is "a.png", but the row has no "image"'),
    ({"image": 7, "conversations": turns("<image>\na", "b")}, '"image" is 7, expected a file name'),
    ("a row", 'found "a row", expected an object'),
    ({"conversations": turns("\ud800", "b")}, "lone surrogate"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/a.png"}}]}]},
     'expected {"type": "text", "text": …} or {"type": "image"}'),
    ('{"conversations": [', "malformed JSON"),
]
RIGHT = [
    {"id": "text only", "conversations": turns("a", "b")},
    {"id": "first", "image": "a.png", "conversations": turns("<image>\na", "b")},
    {"id": "last", "image": "a.png", "conversations": turns("a\n<image>", "b")},
    {"id": "middle", "image": "a.png", "conversations": turns("is <image> a ?", "b")},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "ocr_vqa/1.gif", "sub/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise("RGB", 20, 10, seed=0).save(tmp_path / name)
    return tmp_path


def write(folder, rows, name="rows.jsonl"):
    lines = [row if isinstance(row, str) and row.startswith("{") else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) if name.endswith("l") else json.dumps(rows))
    return folder / name


def checked(folder, *flags):
    """Exit code, and the wrong rows that were written."""
    try:
        check.main([f"--image_dir={folder}", f"--out={folder / 'wrong.jsonl'}", *flags])
        return 0, []
    except Stopped as stop:
        return stop.exit_code, [json.loads(line) for line in (folder / "wrong.jsonl").read_text(encoding="utf-8").splitlines()]


# -----------------------------------------------------------------------------
# tools/check.py

def test_every_fault_is_found_in_one_pass(folder, capsys):
    """Two of each of 19 faults between right rows: all are listed with their row, 20 are shown, each kind is counted."""
    rows = [row for fault, _ in FAULTS for row in (RIGHT[1], fault, fault)]
    code, wrong = checked(folder, f"--data={write(folder, rows)}")
    said = capsys.readouterr().out
    assert code == 1 and [each["row"] for each in wrong] == [row for i in range(len(FAULTS)) for row in (3 * i + 1, 3 * i + 2)]
    for each, (_, message) in zip(wrong[::2], FAULTS, strict=True):
        assert message in each["error"] and "rows.jsonl" in each["error"]
    assert said.count("\n  ") - said.count("\n    ") >= 20 and "  and 18 more\n" in said
    counted = [int(line.split()[0]) for line in said.splitlines() if line.startswith("     ")]
    assert sum(counted) == len(wrong) and len(counted) >= 12


def test_right_files_of_all_shapes(folder, capsys):
    whole = codecs.BOM_UTF8.decode() + write(folder, RIGHT, "rows.json").read_text()
    (folder / "rows.json").write_text(whole, encoding="utf-8")
    assert checked(folder, f"--data={folder / 'rows.json'},{write(folder, RIGHT)}:0.5", "--decode") == (0, [])
    assert "6 rows, 3 with images; 1 image files, all decoded" in capsys.readouterr().out


def test_images_that_cannot_be_read(folder, capsys):
    (folder / "web.png").write_text("<!doctype html>")
    rows = [{"image": name, "conversations": turns("<image>\na", "b")} for name in ("web.png", "a.png", "web.png")]
    path = write(folder, rows)
    assert checked(folder, f"--data={path}")[0] == 0
    code, wrong = checked(folder, f"--data={path}", "--decode", f"--keep={folder / 'kept.jsonl'}")
    assert code == 1 and [each["row"] for each in wrong] == [0, 2] and "a web page, not the file itself" in wrong[0]["error"]
    assert [json.loads(line) for line in (folder / "kept.jsonl").read_text(encoding="utf-8").splitlines()] == [rows[1]]
    with pytest.raises(UserError, match="expected a new FILE.jsonl"):
        checked(folder, f"--data={path}", f"--keep={folder / 'kept.jsonl'}")


def test_pairs_and_lengths(folder, world, capsys):
    pairs = [{"question": "a", "image": "a.png", "chosen": "b", "rejected": "c"}, {"chosen": turns("a", "b"), "rejected": turns("x", "b")}]
    code, wrong = checked(folder, f"--data={write(folder, pairs, 'pairs.json')}")
    assert code == 1 and 'the human turns of "chosen" and "rejected" differ' in wrong[0]["error"]
    long = [{"conversations": turns("dog", "cat " * 90)}]
    assert checked(folder, f"--data={write(folder, long)}", f"--model={world / 'dense'}", "--max_length=50")[0] == 0
    assert "1 rows longer than max_length=50" in capsys.readouterr().out


def test_the_first_row_with_a_kind_says_what_the_file_holds(folder, capsys):
    pairs = [{"question": "a", "chosen": "b", "rejected": "c"}, {"question": "a", "rejected": "c"}, {"chosen": "b", "question": "a"}]
    for broken in ({"id": 1}, {"question": "a", "rejected": "c"}, "text"):
        code, wrong = checked(folder, f"--data={write(folder, [broken, *pairs])}")
        assert code == 1 and [each["row"] for each in wrong] == [0, 2, 3]
    assert "4 pairs" in capsys.readouterr().out
    assert checked(folder, f"--data={write(folder, [row | {'rejected': False} for row in RIGHT])}")[0] == 0     # a column of one's own


def test_a_row_of_two_broken_images_is_one_row(folder):
    (folder / "web.png").write_text("<!doctype html>")
    (folder / "text.png").write_text("text")
    row = {"image": ["web.png", "text.png", "web.png"], "conversations": turns("<image><image><image>\na", "b")}
    with pytest.raises(Stopped, match="^1 of 1 rows are wrong"):
        check.main([f"--image_dir={folder}", f"--out={folder / 'wrong.jsonl'}", f"--data={write(folder, [row])}", "--decode"])
    wrong = [json.loads(line) for line in (folder / "wrong.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(wrong) == 2 and "web.png': not a readable image" in wrong[0]["error"] and "text.png" in wrong[1]["error"]
    assert kind_of(wrong[0]["error"]) == "image …: not a readable image (a web page, not the file itself: fetch it again); replace the file"


OUTPUTS = {
    "out is the data": (["--out={}/rows.jsonl"], "rows.jsonl: is also the data of this run"),
    "out is the data, by a link": (["--out={}/link.jsonl"], "link.jsonl: is also the data of this run"),
    "out is the data, by another path": (["--out={}/sub/../rows.jsonl"], "rows.jsonl: is also the data of this run"),
    "keep is the data": (["--keep={}/rows.jsonl"], "expected a new FILE.jsonl"),
    "keep is a link that leads nowhere": (["--keep={}/dangling.jsonl"], "expected a new FILE.jsonl"),
    "keep is out": (["--out={}/new.jsonl", "--keep={}/sub/../new.jsonl"], "new.jsonl: is also the list of wrong rows"),
    "out is a picture": (["--out={}/a.png"], "a.png: expected FILE.jsonl"),
    "out is empty": (["--out="], "--out=: expected FILE.jsonl"),
    "out is a folder": (["--out={}/folder.jsonl"], "folder.jsonl: is there already, and is not a file"),
    "out is a device": (["--out={}/device.jsonl"], "device.jsonl: is there already, and is not a file"),
    "out is below a file": (["--out={}/a.png/new.jsonl"], "new.jsonl: cannot be written (Not a directory)"),
    "keep is below a file": (["--out={}/new.jsonl", "--keep={}/a.png/x.jsonl"], "x.jsonl: cannot be written (Not a dir"),
    "keep is in /proc": (["--out={}/new.jsonl", "--keep=/proc/x/y.jsonl"], "/proc/x/y.jsonl: cannot be written"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_where_the_results_go_is_checked_before_the_rows(folder, monkeypatch, kind):
    arguments, message = OUTPUTS[kind]
    path = write(folder, [RIGHT[0], FAULTS[0][0]])
    (folder / "link.jsonl").symlink_to(path)
    (folder / "dangling.jsonl").symlink_to("nowhere")
    (folder / "folder.jsonl").mkdir()
    (folder / "device.jsonl").symlink_to("/dev/null")
    before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    monkeypatch.setattr(check, "check_file", None)
    with pytest.raises(UserError) as caught:
        check.main([f"--data={path}", f"--image_dir={folder}", *(each.format(folder) for each in arguments)])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()} == before


# -----------------------------------------------------------------------------
# Shapes of other tools

def test_openai_messages_are_llavas_rows():
    parts = [{"type": "image"}, {"type": "text", "text": "what ?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
           "images": ["a.png"]}
    assert parse_instruction(row) == (["a.png"], [turns("<image>\nwhat ?", "a cat")])
    assert row["images"] == ["a.png"] and "conversations" not in row   # the row itself is left alone
    own = {"id": 1, "image": "a.png", "conversations": turns("<image>\nwhat ?", "a cat")}
    assert llava_row(own) == own
    pair = {"chosen": row["messages"][:1] + [{"role": "assistant", "content": "b"}], "rejected": row["messages"], "image": "a.png"}
    names, [chosen, rejected] = parse_pair(pair)
    assert names == ["a.png"] and [chosen[1]["value"], rejected[1]["value"]] == ["b", "a cat"]


# -----------------------------------------------------------------------------
# skip_bad_rows

def rows_of(folder, path, model, **more):
    return InstructionData([(str(path), 1.0)], str(folder), model.tokenizer, "vicuna", 4, 28, 200, **more)


@pytest.fixture(scope="module")
def model(world):
    return Llava.from_pretrained(world / "dense")


def test_wrong_rows_are_left_out_and_listed(folder, model, capsys):
    rows = [RIGHT[0], *(fault for fault, _ in FAULTS), RIGHT[1]]
    path = write(folder, rows)
    with pytest.raises(UserError, match=r"row 1 id 1: no \"conversations\".*tools.check --data=.*18 more rows are wrong: 2, 3, 4, 5, 6, \.\.\."):
        rows_of(folder, path, model)
    assert not list(folder.glob("*.index"))
    data = rows_of(folder, path, model, skip_bad_rows=True)
    assert data.kept.tolist() == [0, 20] and [each["row"] for each in data.wrong] == list(range(1, 20))
    assert "19 of 21 rows are wrong and left out, since skip_bad_rows is set" in data.notes[0]
    again = rows_of(folder, path, model, skip_bad_rows=True)               # from the index
    assert again.wrong == data.wrong and again.fingerprint == data.fingerprint
    with pytest.raises(UserError, match="18 more rows are wrong"):         # an index of such a file does not hide them
        rows_of(folder, path, model)
    assert "had wrong rows when it was indexed; building its index again" in capsys.readouterr().err
    right = rows_of(folder, write(folder, RIGHT[:2], "right.jsonl"), model, skip_bad_rows=True)
    assert right.wrong == [] and right.fingerprint == rows_of(folder, folder / "right.jsonl", model).fingerprint


def test_training_without_them_is_training_on_the_others(world, folder):
    """The same rows in the same order: bit for bit the same losses."""
    good = json.loads((world / "rows.json").read_text())
    for image in (world / "images").iterdir():
        (folder / image.name).write_bytes(image.read_bytes())
    broken = write(folder, good[:5] + [{"id": "x"}] + good[5:] + [{"image": "gone.png", "conversations": turns("<image>", "a")}], "broken.json")
    more = dict(max_steps=3, image_dir=folder)
    train.main(flags(world, "sft", folder / "skipped", data=broken, skip_bad_rows=True, **more))
    train.main(flags(world, "sft", folder / "whole", data=write(folder, good, "good.json"), **more))
    assert [each["loss"] for each in records(folder / "skipped")] == [each["loss"] for each in records(folder / "whole")]
    listed = [json.loads(line) for line in (folder / "skipped" / "bad_rows.jsonl").read_text().splitlines()]
    assert [each["row"] for each in listed] == [5, 33] and not (folder / "whole" / "bad_rows.jsonl").exists()


def test_rlaif_vs_own_columns(folder, model):
    """Its parquet has image bytes; what is left of a row are these keys, with more that do not matter."""
    row = {"ds_name": "RLAIF-V", "question": "what ?", "chosen": "a cat", "rejected": "a dog", "origin_dataset": "x", "idx": 0,
           "image_path": "a.png", "origin_split": "{}"}
    path = write(folder, [row], "pairs.json")
    data = PreferenceData([(str(path), 1.0)], str(folder), model.tokenizer, "vicuna", 4, 28, 200)
    assert len(data) == 1 and len(data[0]["images"]) == 1 and np.array(data[0]["chosen_mask"]).sum() > 0
