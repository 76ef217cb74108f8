"""
engine/index.py and data.py against broken training files: over 1,500, made by mutating valid ones.
Run: python -m pytest tests/robustness/test_fuzz_rows.py

The expected result comes from a plain definition without any index: the whole file in json.loads, every row checked
by one predicate, rendered in full, cut or dropped. If it is wrong: a UserError of one line, which names
the file, and the first wrong row where it is a row that is wrong. If it is right: these very samples. The data file
itself never changes.
"""
import copy
import itertools
import json
from datetime import timedelta

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from PIL import Image

from conftest import ODD_LETTER, make_tokenizer
from configurator import UserError
from data import as_text, render
from engine.index import InstructionData, PreferenceData

IMAGES = ["a.png", f"b {ODD_LETTER}.png"]
PICTURES = ["image", "img", "picture", "photo"]
MAX_LENGTHS = [24, 40, 999]


def turns(*texts):
    return [{"from": who, "value": text} for who, text in zip(itertools.cycle(["human", "gpt"]), texts)]


INSTRUCTIONS = [
    {"id": "1", "image": "a.png", "conversations": turns("<image>\nwhat is there ?", "a red cup .")},
    {"id": 2, "image": ["a.png", f"b {ODD_LETTER}.png"],
     "conversations": turns("the <image>, <image>", "yes", "dog ?", "no " * 40)},
    {"id": None, "conversations": turns("hi 中文 😀", "two and two ."), "source": {"url": ["x", 1.5, None]}},
    {"id": "late", "image": f"b {ODD_LETTER}.png", "conversations": turns("what ?", "see .", "<image>\nthere ?", "kite")},
    {"id": "question only", "conversations": turns("what do you see ?")}]
PREFERENCES = [
    {"id": "1", "image": "a.png", "chosen": turns("<image>\nwhat ?", "a cup"),
     "rejected": turns("<image>\nwhat ?", "a dog " * 9)},
    {"idx": 2, "question": "what is there ?", "image": f"b {ODD_LETTER}.png", "chosen": "a kite", "rejected": "no"},
    {"idx": 3, "question": "中文 ?", "image_path": "a.png", "chosen": "", "rejected": "yes " * 30},
    {"id": 4, "chosen": turns("red ?", "no", "blue ?", "yes"), "rejected": turns("red ?", "yes", "blue ?", "no")},
    {"id": 5, "chosen": turns("red ?", "no"), "rejected": turns("red ?")}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name in IMAGES:
        Image.new("RGB", (5, 4), "red").save(folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<image>"])
    return tokenizer

# -- the plain definition --


def plain_rows(content, is_lines):
    """All rows of a file, or None if it is malformed."""
    try:
        text = content.decode("utf-8-sig")  # a byte order mark at the start does not count
        if is_lines:
            return [json.loads(line) for line in text.split("\n") if line.strip(" \t\r")]
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return rows if isinstance(rows, list) else None


def is_conversation(value):
    return (isinstance(value, list) and value != [] and all(
        isinstance(turn, dict) and turn.get("from") == who and isinstance(turn.get("value"), str)
        and not any(0xd800 <= ord(character) < 0xe000 for character in turn["value"])
        for turn, who in zip(value, itertools.cycle(["human", "gpt"]))))


def plain_sides(kind, row):
    """The conversations of a row and its images, or None if anything about it is wrong."""
    if not isinstance(row, dict):
        return None
    keys = ["image"] if kind is InstructionData else ["image", "image_path"]
    names = next((row[key] for key in keys if row.get(key)), None)
    if names is None:
        names = row.get("image")
        for key, value in row.items():  # a picture under another name must not be lost
            if isinstance(value, (str, list, dict)) and value and any(word in key.lower() for word in PICTURES):
                return None
    if kind is InstructionData:
        sides = [row.get("conversations")]
    elif isinstance(row.get("chosen"), str):
        n_images = len(names) if isinstance(names, list) else int(names is not None)
        if not isinstance(row.get("question"), str):
            return None
        sides = [turns("<image>\n" * n_images + row["question"], row.get(side)) for side in ("chosen", "rejected")]
    else:
        sides = [row.get("chosen"), row.get("rejected")]
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(is_conversation(side) for side in sides) or not all(name in IMAGES for name in names):
        return None
    questions, *others = [[turn["value"] for turn in side[0::2]] for side in sides]
    if any(other != questions for other in others):
        return None
    if kind is PreferenceData and not plain_texts(row.get("question")) <= plain_texts(sides[0]):
        return None
    if not names and not any("<image>" in (question.strip()[:7], question.strip()[-7:]) for question in questions):
        return [[turn | {"value": as_text(turn["value"])} for turn in side] for side in sides], names
    if "".join(questions).count("<image>") != len(names):
        return None
    return sides, names


def plain_texts(value):
    """What the human says, in one text or in turns."""
    turns = value if isinstance(value, list) else [{"from": "human", "value": value}]
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "human"]
    return {text.replace("<image>", "").strip() for text in texts if isinstance(text, str)} - {""}


def plain_sample(kind, sides, tokenizer, max_length):
    """[(ids, mask)] of each side, or None if the row is not usable."""
    if len(sides) == 2 and [turn["value"] for turn in sides[0]] == [turn["value"] for turn in sides[1]]:
        return None
    sequences = [render(side, tokenizer, "vicuna", image_tokens=4) for side in sides]
    if not all(sum(mask[:max_length]) for _, mask in sequences):
        return None
    for ids, _ in sequences:
        if len(ids) > max_length and (kind is PreferenceData or tokenizer.token_to_id("<image>") in ids[max_length:]):
            return None
    return [(ids[:max_length], mask[:max_length]) for ids, mask in sequences]

# -- broken rows and broken bytes --


TEXTS = ["", " ", "<image>", "<image>\n<image>", "\ud800", "\udfff x", "\0", "a.png", f"b {ODD_LETTER}.png", "../a.png", "gone.png",
         "a\0.png", "x" * 300, "an <image> tag", "human", "gpt", "<|endoftext|>", "😀" * 50, "\u2028\r\n"]
ODD = TEXTS + [None, True, 0, -1, 10 ** 400, 1e308, float("nan"), float("inf"), [], {}, [[]], [None], ["a.png"],
               ["a.png", 3], {"from": "gpt", "value": "x"}, turns("hi", "ho"), turns("<image>", "ho")]
DEEP = ["[" * 60 + "]" * 60, '{"a":' * 300 + "1" + "}" * 300]
KEYS = ["id", "idx", "image", "image_path", "conversations", "chosen", "rejected", "question", "from", "value", "",
        "Image", "images", "image_file", "\ud800"]
WRAPS = [lambda value: [value], lambda value: {"value": value}, json.dumps]
BYTES = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\\u", b"\\ud800", b"\n", b"\r", b"\0", b"\xff", b"\xc3",
         b"\xef\xbb\xbf", b" ", b"\xe2\x80\xa8", b"1", b"-", b"e9", b"null", b"NaN", b"[" * 3000, b"9" * 5000,
         b"<image>", b"//", b"'", b'{"a": 1}', b"[],"]


def places(value, path=()):
    """The path to every value inside a value, as far as rows normally go."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    for key, child in inside if len(path) < 5 else []:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutate(draw, rows):
    path = draw(st.sampled_from(list(places(rows))))
    parent, key = rows, path[-1]
    for step in path[:-1]:
        parent = parent[step]
    what = draw(st.sampled_from(["replace", "replace", "insert", "delete", "rename", "double", "wrap", "move", "deep"]))
    if what == "delete":
        del parent[key]
    elif what == "replace":
        parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    elif what == "deep":
        parent[key] = json.loads(draw(st.sampled_from(DEEP)))
    elif what == "wrap":
        parent[key] = draw(st.sampled_from(WRAPS))(parent[key])
    elif what == "insert" and isinstance(parent[key], str):
        at = draw(st.integers(0, len(parent[key])))
        parent[key] = parent[key][:at] + draw(st.sampled_from(TEXTS)) + parent[key][at:]
    elif isinstance(parent, dict):
        parent[draw(st.sampled_from(KEYS))] = parent.pop(key) if what == "rename" else copy.deepcopy(parent[key])
    elif what == "double":
        parent.insert(key, copy.deepcopy(parent[key]))
    elif what == "move":
        parent.insert(0, parent.pop(key))


@st.composite
def broken_rows(draw):
    kind, rows = draw(st.sampled_from([(InstructionData, INSTRUCTIONS), (PreferenceData, PREFERENCES)]))
    rows = copy.deepcopy(rows)
    for _ in range(draw(st.integers(1, 3))):
        if rows:
            mutate(draw, rows)
    name, as_ascii = draw(st.sampled_from(["json", "jsonl"])), draw(st.booleans())
    texts = [json.dumps(row, ensure_ascii=as_ascii) for row in rows]
    text = "\n".join(texts) if name == "jsonl" else "[" + ",\n".join(texts) + "]"
    return kind, name, text.encode(errors="surrogatepass")


@st.composite
def broken_bytes(draw):
    kind, rows = draw(st.sampled_from([(InstructionData, INSTRUCTIONS), (PreferenceData, PREFERENCES)]))
    name = draw(st.sampled_from(["json", "jsonl"]))
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = ("\n".join(texts) if name == "jsonl" else "[" + ", ".join(texts) + "]\n").encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(1, 40)))
        what = draw(st.sampled_from(["insert", "insert", "flip", "cut", "truncate", "double"]))
        if what == "insert":
            content = content[:start] + draw(st.sampled_from(BYTES)) + content[start:]
        elif what == "flip" and start < len(content):
            content = content[:start] + bytes([content[start] ^ 1 << draw(st.integers(0, 7))]) + content[start + 1:]
        elif what == "cut":
            content = content[:start] + content[stop:]
        elif what == "double":
            content = content[:stop] + content[start:]
        elif what == "truncate":
            content = content[:start]
    return kind, name, content


NUMBERS = itertools.count()  # for the files' names: the same name within a tick of the clock could hide a change


def compare_with_the_plain_definition(case, max_length, folder, tokenizer):
    kind, name, content = case
    path = folder / f"{next(NUMBERS)}.{name}"
    path.write_bytes(content)
    before = path.stat()
    rows = plain_rows(content, name == "jsonl")
    found = [plain_sides(kind, row) for row in rows or []]
    try:
        dataset, error = kind([(str(path), 1.0)], str(folder), tokenizer, "vicuna", 4, 28, max_length), None
        samples = [dataset[i] for i in range(len(dataset))]
    except UserError as caught:
        error = str(caught)
    assert path.read_bytes() == content and path.stat().st_mtime_ns == before.st_mtime_ns
    left = list(folder.glob(f"{path.name}.*"))
    for other in [path, *left]:
        other.unlink()
    if rows is None or None in found:
        first = f" row {found.index(None)}" if rows is not None else ""
        assert error is not None and error.startswith(f"{path}{first}") and "\n" not in error and left == []
        return
    expected = [(number, sequences, len(names)) for number, (sides, names) in enumerate(found)
                if (sequences := plain_sample(kind, sides, tokenizer, max_length)) is not None]
    if not expected:
        assert error.startswith(f"{path}: no row left to train on") and "\n" not in error
        return
    assert error is None and len(samples) == len(expected) and len(left) == 1
    for i, (sample, (number, sequences, n_images)) in enumerate(zip(samples, expected)):
        *parts, images = sample.values()
        assert parts == [part for sequence in sequences for part in sequence] and len(images) == n_images
        assert dataset.lengths[i] == max(len(ids) for ids, _ in sequences)
        assert dataset.describe(i) == f"{path} row {number}"


FUZZ = settings(max_examples=800, derandomize=True, deadline=timedelta(seconds=5), database=None)


@FUZZ
@given(broken_rows(), st.sampled_from(MAX_LENGTHS))
def test_broken_rows(folder, tokenizer, case, max_length):
    compare_with_the_plain_definition(case, max_length, folder, tokenizer)


@FUZZ
@given(broken_bytes(), st.sampled_from(MAX_LENGTHS))
def test_broken_bytes(folder, tokenizer, case, max_length):
    compare_with_the_plain_definition(case, max_length, folder, tokenizer)
