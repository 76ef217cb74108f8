"""
engine/index.py: rows on disk, their index, and the datasets. Run: python -m pytest tests/test_index.py

Compared with: json.loads of the whole file, rows rendered in full and cut or dropped one by one, and plain counting.
"""
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from configurator import UserError
from conftest import ODD_LETTER
from data import render, transform_image
from engine import index as index_file
from engine.index import InstructionData, PreferenceData, measure, parse_sources, scan_rows
from test_data import ANSWERS, QUESTIONS, noise, qwen_tokenizer, turns


def make_world(tmp_path):
    """A folder with two images, and a function that writes a data file into it."""
    for i, name in enumerate(["a.png", "b.png"]):
        noise("RGB", 40, 30, seed=i).save(tmp_path / name)

    def write(rows, name="rows.json"):
        lines = name.endswith(".jsonl")
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))
        return str(tmp_path / name)
    write.folder = tmp_path
    return write


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def dataset(kind, world, *files, max_length=200):
    sources = [file if isinstance(file, tuple) else (file, 1.0) for file in files]
    return kind(sources, str(world.folder), qwen_tokenizer(), "vicuna", image_tokens=4, image_size=28,
                max_length=max_length)


def row(id, *texts, **more):
    return {"id": id, "conversations": turns(*texts), **more}


# -----------------------------------------------------------------------------
# Files to samples

def test_parse_sources():
    assert parse_sources("a.json:0.5,b.jsonl") == [("a.json", 0.5), ("b.jsonl", 1.0)]
    assert parse_sources("x:y/a.json, b.json:2") == [("x:y/a.json", 1.0), ("b.json", 2.0)]
    for text in ["", "a.json,", "a.txt", "a.json:", "a.json:half", "a.json:0", "a.json:-1", "a.json:nan", "a.json:inf",
                 "a:2"]:
        with pytest.raises(UserError, match="expected FILE.json, FILE.jsonl or FILE.json:WEIGHT"):
            parse_sources(text)


def test_instruction_rows(world):
    first = world([row("one", "<image>\nWhat?", "A cat.", image="a.png"), row("none", "Hi", "Ho")])
    second = world([row("two", "<image> or <image>?", "Both.", image=["b.png", "a.png"])], "more.jsonl")
    data = dataset(InstructionData, world, (first, 0.5), (second, 2.0))
    assert len(data) == 3 and data.notes == [] and data.sources == [(0, 2, 0.5), (2, 3, 2.0)]
    assert [len(data[i]["images"]) for i in range(3)] == [1, 0, 2]
    conversations = [turns("<image>\nWhat?", "A cat."), turns("Hi", "Ho"), turns("<image> or <image>?", "Both.")]
    for i in range(3):
        ids, mask = render(conversations[i], qwen_tokenizer(), "vicuna", 4)
        assert data[i]["input_ids"] == ids and data[i]["mask"] == mask and data.lengths[i] == len(ids)
    picture = transform_image(Image.open(world.folder / "b.png"), 28)
    assert torch.equal(data[2]["images"][0], picture)


def test_preference_rows(world):
    file = world([
        {"id": "p", "image": "a.png", "chosen": turns("<image>\nWhat?", "A cat."),
         "rejected": turns("<image>\nWhat?", "A dog, I think.")},
        {"idx": 7, "question": "What?", "image_path": "b.png", "chosen": "Red.", "rejected": "Blue."},
        {"idx": 8, "question": "2 + 2?", "chosen": "4", "rejected": "5"},
    ])
    data = dataset(PreferenceData, world, file)
    tokenizer, pairs = qwen_tokenizer(), [
        (turns("<image>\nWhat?", "A cat."), turns("<image>\nWhat?", "A dog, I think.")),
        (turns("<image>\nWhat?", "Red."), turns("<image>\nWhat?", "Blue.")),
        (turns("2 + 2?", "4"), turns("2 + 2?", "5")),
    ]
    for i, (chosen, rejected) in enumerate(pairs):
        assert (data[i]["chosen_ids"], data[i]["chosen_mask"]) == render(chosen, tokenizer, "vicuna", 4)
        assert (data[i]["rejected_ids"], data[i]["rejected_mask"]) == render(rejected, tokenizer, "vicuna", 4)
        assert data.lengths[i] == max(len(data[i]["chosen_ids"]), len(data[i]["rejected_ids"]))
    pictures = [transform_image(Image.open(world.folder / name), 28) for name in ("a.png", "b.png")]
    assert torch.equal(torch.stack(data[0]["images"] + data[1]["images"]), torch.stack(pictures))
    assert data[2]["images"] == []


def test_long_rows_are_cut_or_dropped_and_named(world):
    base = len(render(turns("Hi", "Ho"), qwen_tokenizer())[0])  # " Ho" and the end token are its last two
    rows = [row("short", "Hi", "Ho"),
            row("long answer", "Hi", "Ho " * 20),
            row("long question", "Hi " * 50, "Ho"),
            row("late image", "Hi", "Ho", "<image>", "A cat.", image="a.png"),
            row("no answer", "Hi"),
            row("second answer cut off", "Hi", "Ho", "Really?", "Yes.")]
    data = dataset(InstructionData, world, world(rows), max_length=base)
    assert data.lengths.tolist() == [base, base, base] and data.lengths.dtype == np.int32
    assert data.sources == [(0, 3, 1.0)] and [data.describe(i) for i in range(3)] == [
        f"{world.folder / 'rows.json'} row {number}" for number in (0, 1, 5)]
    assert [len(data[i]["input_ids"]) for i in range(3)] == [len(data[i]["mask"]) for i in range(3)] == [base] * 3
    assert data[2]["input_ids"] == data[0]["input_ids"] and sum(data[1]["mask"]) == 2
    file = str(world.folder / "rows.json")
    assert data.notes == [
        f"4 of 6 rows are longer than max_length={base}: 2 cut, 2 dropped since no answer is left, or not every image "
        f'(first: {file} row 2 id "long question")',
        f'1 of 6 rows have no answer to train on and are dropped (first: {file} row 4 id "no answer")']

    # a cut through the middle of an image drops the row as well
    whole = len(render(turns("Hi", "Ho", "<image>", "A cat."), qwen_tokenizer(), "vicuna", 4)[0])
    two = world([rows[0], rows[3]], "two.json")
    middle = [dataset(InstructionData, world, two, max_length=whole - n) for n in range(14)]
    assert [len(data) for data in middle] == [2] * 9 + [1] * 5
    for data in middle:
        assert all(data[i]["input_ids"].count(151646) == 4 * len(data[i]["images"]) for i in range(len(data)))

    with pytest.raises(UserError, match="no row left to train on: 2 of 2 rows are longer than max_length=5"):
        dataset(InstructionData, world, world(rows[:2]), max_length=5)
    with pytest.raises(UserError, match="no row left to train on: the files are empty"):
        dataset(InstructionData, world, world([]))


def test_long_pairs_are_dropped_never_cut(world):
    base = len(render(turns("Hi", "Ho"), qwen_tokenizer())[0])
    rows = [{"id": i, "chosen": turns("Hi", chosen), "rejected": turns("Hi", rejected)}
            for i, (chosen, rejected) in enumerate([("Ho", "No"), ("Ho " * 9, "Ho"), ("Ho", "Ho " * 9)])]
    data = dataset(PreferenceData, world, world(rows), max_length=base)
    assert len(data) == 1
    assert data.notes == [f"2 of 3 rows are longer than max_length={base}: 0 cut, 2 dropped since a cut answer is "
                          f"a different answer (first: {world.folder / 'rows.json'} row 1 id 1)"]


def test_pairs_of_two_equal_answers_are_dropped_and_named(world):
    rows = [{"id": i, "chosen": turns("Hi", chosen), "rejected": turns("Hi", rejected)}
            for i, (chosen, rejected) in enumerate([("Ho", "No"), ("Ho", "Ho"), ("Ho " * 99, "Ho " * 99)])]
    rows.append({"id": 3, "question": "Hi", "chosen": "Ho", "rejected": "Ho"})
    data = dataset(PreferenceData, world, world(rows))
    assert len(data) == 1 and data.notes == ["3 of 4 pairs have two equal answers, which teach nothing, and are dropped "
                                             f"(first: {world.folder / 'rows.json'} row 1 id 1)"]
    with pytest.raises(UserError, match="no row left to train on: 1 of 1 pairs have two equal answers"):
        dataset(PreferenceData, world, world(rows[1:2]))


@pytest.mark.parametrize("bad, expected", [
    ("hello", 'row 1: found "hello", expected an object'),
    ({"id": 5, "conversation": []}, 'row 1 id 5: no "conversations", found the keys ["conversation", "id"]'),
    ({"id": "x", "conversations": "hi"}, 'row 1 id "x": found "hi" as a conversation, expected a list'),
    (row("x", "Hi", 3), 'row 1 id "x": turn 1 is {"from": "gpt", "value": 3}, expected {"from": "gpt"'),
    (row("x", "Hi", "Ho", image=3), 'row 1 id "x": "image" is 3, expected a file name or a list of file names'),
    (row("x", "Hi", "Ho", image=["a.png", None]), 'row 1 id "x": "image" is ["a.png", null], expected'),
    (row("x", "<image> Hi", "Ho"), 'row 1 id "x": 1 <image> in the text but 0 images in the row'),
    (row("x", "Hi", "Ho", image="a.png"), 'row 1 id "x": 0 <image> in the text but 1 images in the row'),
    (row("x", "<image><image>", "Ho", image=["a.png"]), 'row 1 id "x": 2 <image> in the text but 1 images in the row'),
    (row("x", "<image>", "Ho", image="gone.png"), "gone.png' does not exist; check image_dir and the name"),
    (row("x", "<image>", "Ho", image=""), "does not exist"),
    (row("x", "<image>", "Ho", image="a\0.png"), "does not exist"),
    (row("x", "Hi", "Ho \ud800"), 'row 1 id "x": the text has a lone surrogate'),
    (row(None, "Hi", "Ho") | {"id": ["\n" * 80]}, None),  # an odd id alone is no error
])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_bad_instruction_rows(world, bad, expected, name):
    file = world([row("ok", "Hi", "Ho"), bad], name)
    if expected is None:
        assert len(dataset(InstructionData, world, file)) == 2
        return
    with pytest.raises(UserError) as caught:
        dataset(InstructionData, world, file)
    line = str(caught.value)
    assert line.startswith(f"{file} row 1") and expected in line and "\n" not in line


@pytest.mark.parametrize("bad, expected", [
    ({"id": 3, "chosen": turns("Hi", "Ho")}, 'id 3: no "rejected", found the keys ["chosen", "id"]'),
    (row(3, "Hi", "Ho"), 'id 3: no "chosen", found the keys ["conversations", "id"]'),
    ({"id": 3, "chosen": "a", "rejected": "b"}, 'id 3: "question" is null, expected a text'),
    ({"idx": 3, "question": "q", "chosen": "a", "rejected": None}, 'id 3: turn 1 is {"from": "gpt", "value": null}'),
    ({"idx": 3, "question": "q", "chosen": "a", "rejected": "b", "image": {"bytes": "..."}},
     '"image" is {"bytes": "..."}, expected'),
    ({"idx": 3, "question": "<image> q", "chosen": "a", "rejected": "b", "image": "a.png"},
     "2 <image> in the text but 1 images"),
    ({"id": 3, "chosen": turns("Hi", "Ho"), "rejected": turns("Hm", "Ho")},
     'the human turns of "chosen" and "rejected" differ'),
    ({"id": 3, "chosen": turns("Hi", "Ho"), "rejected": "Ho"}, 'found "Ho" as a conversation'),
    ({"id": 3, "chosen": turns("<image>", "Ho"), "rejected": turns("<image>", "No")},
     "1 <image> in the text but 0 images"),
])
def test_bad_preference_rows(world, bad, expected):
    file = world([{"id": "ok", "chosen": turns("Hi", "Ho"), "rejected": turns("Hi", "No")}, bad])
    with pytest.raises(UserError) as caught:
        dataset(PreferenceData, world, file)
    line = str(caught.value)
    assert line.startswith(f"{file} row 1") and expected in line and "\n" not in line


def numbered_rows(world, n=12):
    rows = [row(i, "<image> Hi" if i % 3 else "Hi", f"Ho {i} " * (1 + i % 4), **({"image": "a.png"} if i % 3 else {}))
            for i in range(n)]
    return dataset(InstructionData, world, world(rows), max_length=300)


def test_spawned_workers_read_the_same(world):
    """Spawned processes get the dataset pickled; nothing of it may belong to the process that made it."""
    data = numbered_rows(world)
    data[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = pool.map(data.__getitem__, range(len(data)))
    assert [sample["input_ids"] for sample in theirs] == [data[i]["input_ids"] for i in range(len(data))]


# -----------------------------------------------------------------------------
# The JSON reader

@pytest.mark.parametrize("name, content, expected", [
    ("x.json", b'[{"id": 1},\n {"id": 2,}]', "x.json line 2: malformed JSON, "),
    ("x.json", b"", 'x.json: found "", expected a list of rows; if it has one object per line, name it .jsonl'),
    ("x.json", b'{"id": 1}\n{"id": 2}\n', r'x.json: found "{\"id\": 1}\n{\"id\": 2}\n", expected a list of rows; '
                                          "if it has one object per line, name it .jsonl"),
    ("x.json", b'{"rows": []}', r'x.json: found "{\"rows\": []}", expected a list of rows'),
    ("x.json", b'[{"a": "\xc3\xa9"},\n "\xc3\xa9\xff"]',
     "x.json line 2: malformed JSON, bytes that are not UTF-8 at column 4"),
    ("x.json", b"[" * 200_000, "x.json line 1: malformed JSON, maximum recursion depth exceeded"),
    ("x.json", b"[" + b"1" * 5000 + b"]", "x.json line 1: malformed JSON, Exceeds the limit"),
    ("x.jsonl", b'{"id": 1}\n\n{"id": 2\n', "x.jsonl line 3: malformed JSON, "),
    ("x.jsonl", b'{"id": 1}\n{"id": 2} {"id": 3}\n', "x.jsonl line 2: malformed JSON, Extra data at column 11"),
])
def test_malformed_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(scan_rows(str(tmp_path / name)))
    assert str(caught.value).startswith(str(tmp_path / expected)) and "\n" not in str(caught.value)


def test_missing_files_and_blank_lines(tmp_path):
    with pytest.raises(UserError, match="gone.json: no such file"):
        list(scan_rows(str(tmp_path / "gone.json")))
    (tmp_path / "x.jsonl").write_text('{"id": 1}\n\n{"id": 2}\n\n')
    assert list(scan_rows(str(tmp_path / "x.jsonl"))) == [(0, 9, {"id": 1}), (11, 9, {"id": 2})]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_byte_order_mark_at_the_start_is_skipped(world, name):
    """Some editors write one. Offsets count its three bytes; columns do not."""
    rows = [row("é", "Hi", "Ho"), row(1, "Hi", "Ho 中")]
    path = Path(world(rows, name))
    plain = list(scan_rows(str(path)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(scan_rows(str(path))) == [(offset + 3, size, row) for offset, size, row in plain]
    data = dataset(InstructionData, world, str(path))
    for i in range(2):
        assert data[i]["input_ids"] == render(rows[i]["conversations"], qwen_tokenizer())[0]

    path.write_bytes("\ufeff[nul]".encode() if name == "x.json" else "\ufeff nul".encode())
    with pytest.raises(UserError, match=f"^{path} line 1: malformed JSON, Expecting value at column 2$"):
        list(scan_rows(str(path)))
    path.write_bytes("[1, \ufeff2]".encode() if name == "x.json" else "1\n\ufeff2".encode())
    where = "line 1: malformed JSON, Expecting value at column 5" if name == "x.json" else "line 2: .* at column 1"
    with pytest.raises(UserError, match=f"^{path} {where}$"):
        list(scan_rows(str(path)))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("bad, found", [("[" * 100_000, "maximum recursion depth exceeded"),
                                        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit")])
def test_a_row_that_python_cannot_hold_is_named_by_its_line(tmp_path, name, bad, found):
    path, texts = tmp_path / name, ['"é"', bad, "3"]
    path.write_text("[" + ",\n".join(texts) + "]" if name == "x.json" else "\n".join(texts), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{path} line 2: malformed JSON, {found}.* at column 1$") as caught:
        list(scan_rows(str(path)))
    assert "\n" not in str(caught.value)


MIXED = [row("é", "<image>\nWas ist das? 中文", "Eine Kätzchen 😀 \\ \" ]", image="a.png"), row(1, "Hi", "Ho " * 9),
         row(2, "Hi", extra=[1.5e3, -0.25, None, True, {"ü": [[], {}]}]),
         row("\n", "x <image> y <image>", "z " * 30, "<image>", "?", image=["b.png", "a.png", f"{ODD_LETTER}.png"]),
         row(4, "long " * 40, "Ho", "Hi", "Ho")]
PAIRS = [{"id": i, "chosen": turns("Hi é", chosen), "rejected": turns("Hi é", rejected)}
         for i, (chosen, rejected) in enumerate([("Ho", "No 中"), ("Ho " * 99, "Ho"), ("", "Ho")])]
PAIRS += [{"id": "no answer", "chosen": turns("Hi", "Ho"), "rejected": turns("Hi")},
          {"idx": 9, "question": "Wö?", "image_path": f"{ODD_LETTER}.png", "chosen": "Red.", "rejected": "Blue."}]


def spellings(rows, folder):
    """The same rows as one line, indented, in UTF-8 and escaped, with lots of white space, and one per line."""
    utf8 = functools.partial(json.dumps, ensure_ascii=False)
    contents = {"plain.json": utf8(rows), "escaped.json": json.dumps(rows), "indented.json": utf8(rows, indent=3),
                "spaced.json": "\r\n\t [" + " \n,\n\n ".join(map(utf8, rows)) + "\n]\r\n \n",
                "lines.jsonl": "\r\n \n".join(map(utf8, rows))}
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode())
        yield str(folder / name)


def test_rows_are_where_the_reader_says(tmp_path):
    odd = [1, 12.5, -1.5e-7, "😀", "a" * 300, None, True, [[]], -float("inf"), 1234567890123]
    for rows in [MIXED, PAIRS, odd, []]:
        for path in spellings(rows, tmp_path):
            found = list(scan_rows(path))
            content = Path(path).read_bytes()
            assert [row for _, _, row in found] == rows
            cuts = [content[offset:offset + size] for offset, size, _ in found]
            assert [json.loads(cut) for cut in cuts] == rows and [cut.strip() for cut in cuts] == cuts


def test_malformed_json_is_found_where_json_finds_it(tmp_path):
    whole = json.dumps(MIXED[:3], indent=1, ensure_ascii=False)
    texts = [whole[:n] for n in range(7, len(whole), 7)] + [
        whole + "]", whole + " x", "[1 2]", "[1}", '["\t"]', '["\\x"]', '["\\u12G4"]', "[nul]", "[1.]", "[-]",
        '[{"a"}]', '[{"a":1 "b":2}]', '[{"a": 1,}]', "[\n\n1,\n,2]", "[" + " " * 99 + "\n\n é]", '["a\nb"]',
        '[{"é": "中" é}]']
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(json.JSONDecodeError) as theirs:
            json.loads(text)
        with pytest.raises(UserError) as ours:
            list(scan_rows(str(path)))
        error, line = theirs.value, str(ours.value)
        assert line.startswith(f"{path} line {error.lineno}: malformed JSON, {error.msg} at column {error.colno}"), text
    path.write_text("[1\n, ]")                                       # json's own words for this depend on Python's version
    with pytest.raises(UserError, match="line 2: malformed JSON, Illegal trailing comma before end of array at column 1"):
        list(scan_rows(str(path)))


# -----------------------------------------------------------------------------
# The index of a file

def count_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(index_file, "render", lambda *args, **more: calls.append(args) or render(*args, **more))
    return calls


def test_an_index_is_used_until_the_file_changes(world, monkeypatch, capsys):
    noise("RGB", 9, 9).save(world.folder / f"{ODD_LETTER}.png")
    file, calls, checked = world(MIXED * 2), count_calls(monkeypatch), []
    monkeypatch.setattr(os.path, "isfile", lambda path, isfile=os.path.isfile: checked.append(path) or isfile(path))
    first = dataset(InstructionData, world, file)
    assert sorted(map(os.path.basename, checked)) == ["a.png", "b.png", f"{ODD_LETTER}.png"]  # each image only once
    [index] = world.folder.glob("rows.json.????????.index")
    assert len(calls) == 10 and not list(world.folder.glob("*.tmp"))
    again = dataset(InstructionData, world, file)
    other = dataset(InstructionData, world, file, max_length=45)  # needs no other index
    assert len(calls) == 10 and (again.lengths == first.lengths).all() and again.notes == first.notes
    assert len(other) < len(first) and max(other.lengths) == 45 < first.lengths[1]
    assert again.fingerprint == first.fingerprint != other.fingerprint

    with pytest.raises(UserError, match="no \"chosen\""):  # another kind of row has another index
        dataset(PreferenceData, world, file)
    assert list(world.folder.glob("*.index")) == [index] and not list(world.folder.glob("*.tmp"))
    assert capsys.readouterr().err == ""

    stat = Path(file).stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UserError, match=f"^{file}: changed since it was indexed; start again"):
        first[0]
    assert dataset(InstructionData, world, file).fingerprint == first.fingerprint  # same content, newer time
    assert len(calls) == 20
    assert capsys.readouterr().err == f"{file}: changed since it was indexed; building its index again\n"
    world(MIXED[:2])
    assert dataset(InstructionData, world, file).fingerprint != first.fingerprint
    Path(file).unlink()
    with pytest.raises(UserError, match="rows.json: no such file"):
        dataset(InstructionData, world, file)


def test_what_the_numbers_depend_on_has_its_own_index(world):
    file = world(MIXED[1:3] + [row(5, "<image>", "Ho", image="a.png")])
    (world.folder / "more").mkdir()
    shutil.copy(world.folder / "a.png", world.folder / "more" / "a.png")
    (world.folder / "other").mkdir()
    noise("RGB", 9, 9).save(world.folder / "other" / "a.png")
    added = Tokenizer.from_str(qwen_tokenizer().to_str())
    added.add_tokens(["Ho Ho"])
    usual = dict(image_dir=str(world.folder), tokenizer=qwen_tokenizer(), template="vicuna", image_tokens=4,
                 image_size=28, max_length=99)
    changes = [{}, {"image_dir": str(world.folder / "more")}, {"tokenizer": added}, {"template": "chatml"},
               {"image_tokens": 5}, {"image_dir": str(world.folder / "other")}]
    fingerprints = []
    for n, change in enumerate(changes, start=1):
        data = InstructionData([(file, 1.0)], **usual | change)
        assert len(list(world.folder.glob("rows.json.*.index"))) == n
        assert len(data) == 2 and [len(data[i]["input_ids"]) for i in range(2)] == data.lengths.tolist()
        fingerprints.append(data.fingerprint)
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 5  # the place of the images does not count


def test_progress_is_reported_every_few_seconds(world, monkeypatch, capsys):
    file, clock = world([row(i, "Hi", "Ho") for i in range(12)]), itertools.count(step=1)
    monkeypatch.setattr(index_file, "time", types.SimpleNamespace(time=clock.__next__))
    dataset(InstructionData, world, file)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 3 and all(re.fullmatch(rf"{file}: \d+ rows indexed, \d a second, \d+% of the file", line)
                                        for line in lines)


@pytest.mark.parametrize("kind, rows", [(InstructionData, MIXED), (PreferenceData, PAIRS)])
@pytest.mark.parametrize("max_length", [40, 56, 60, 64, 68, 80, 110, 999])
def test_samples_are_those_of_the_plain_definition(world, kind, rows, max_length):
    """Everything in memory, whole rows rendered in full, and cut or dropped one by one."""
    noise("RGB", 9, 9).save(world.folder / f"{ODD_LETTER}.png")
    expected, no_answer = [], 0
    for number, raw in enumerate(rows):
        if kind is InstructionData:
            sides, images = [raw["conversations"]], raw.get("image", [])
        elif isinstance(raw["chosen"], str):
            sides = [turns("<image>\n" + raw["question"], raw[side]) for side in ("chosen", "rejected")]
            images = raw["image_path"]
        else:
            sides, images = [raw["chosen"], raw["rejected"]], []
        sequences = [render(side, qwen_tokenizer(), "vicuna", image_tokens=4) for side in sides]
        kept = [(ids[:max_length], mask[:max_length]) for ids, mask in sequences]
        if not all(sum(mask) for _, mask in sequences):
            no_answer += 1
        elif kind is PreferenceData and kept != sequences:
            pass
        elif all(sum(mask) for _, mask in kept) and not any(151646 in ids[max_length:] for ids, _ in sequences):
            expected.append((number, kept, len([images] if isinstance(images, str) else images)))
    try:
        data = dataset(kind, world, world(rows), max_length=max_length)
    except UserError as error:
        assert not expected and "no row left to train on" in str(error)
        return
    is_noted = any(f"{no_answer} of {len(rows)}" in note for note in data.notes)
    assert len(data) == len(expected) and is_noted == (no_answer > 0)
    for i, (number, sequences, images) in enumerate(expected):
        *parts, pictures = data[i].values()
        assert parts == [part for sequence in sequences for part in sequence] and len(pictures) == images
        assert data.describe(i) == f"{world.folder / 'rows.json'} row {number}"
        assert data.lengths[i] == max(len(ids) for ids, _ in sequences)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=3), st.sampled_from(["vicuna", "chatml"]),
       st.integers(1, 9))
def test_lengths_from_one_token_per_image(pairs, template, image_tokens):
    conversation = turns(*itertools.chain.from_iterable(pairs))
    ids, mask = render(conversation, qwen_tokenizer(), template, image_tokens)
    images = [i for i, token in enumerate(ids) if token == 151646]
    min_length = max([mask.index(1), *images]) + 1
    assert measure(conversation, qwen_tokenizer(), template, image_tokens) == (len(ids), min_length)