"""
Files that a user names, whatever they are: a folder, a pipe, a device, without permission, on a failing disk, under an
impossible name, damaged, another kind of file. Each is one line that names the file, at every place where one is read.

    python -m pytest tests/robustness/test_user_files.py
"""
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from configurator import UserError, load_config, require_memory
from conftest import make_tokenizer
from data import Sampler, as_text, load_image, render
from engine import files, index
from engine.hf import open_weights, read_tokenizer
from engine.index import InstructionData, PreferenceData, parse_sources
from engine.rows import parse_instruction, parse_pair
from model import Llava
from moe import upcycle
from tools import answer

ROOT = Path(sample.__file__).parent

# Every way to read a file: its usual name, and the reader.
READERS = {
    "config file": ("a.py", lambda path: load_config({"lr": 1.0}, [path])),
    "text": ("a.txt", files.read_text),
    "json": ("a.json", files.read_json),
    "answers": ("a.jsonl", files.read_rows),
    "rows": ("a.json", lambda path: list(index.scan_rows(path))),
    "row lines": ("a.jsonl", lambda path: list(index.scan_rows(path))),
    "indexed": ("a.json", lambda path: index.open_index(path, {}, None)),
    "digest": ("a.json", files.sha256_of_file),
    "image": ("a.png", load_image),
    "safetensors": ("a.safetensors", lambda path: open_weights(Path(path))),
    "bin": ("a.bin", lambda path: open_weights(Path(path))),
    "tokenizer": ("tokenizer.json", lambda path: read_tokenizer(Path(path).parent, 100)),
}


@pytest.fixture(autouse=True)
def no_hang():
    """A read that waits for a pipe's writer or for the end of a device fails after a minute."""
    def stop(*_):
        raise AssertionError("it hangs")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def line_of(call, *args, **more):
    with pytest.raises(UserError) as caught:
        call(*args, **more)
    line = str(caught.value)
    assert "\n" not in line
    return line


def make(kind, path):
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        import socket
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "circular link":
        path.symlink_to(path.name)
    elif kind == "input error":
        path.symlink_to("/proc/self/mem")                            # reading address 0 fails with EIO


FOUND = {"folder": "a folder, not a file", "pipe": "a pipe or a device", "socket": "a pipe or a device",
         "link to a device": "a pipe or a device", "broken link": "no such file", "nothing": "no such file",
         "circular link": "symbolic links", "input error": "Input/output error"}


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_readable_file_is_named(tmp_path, reader, kind, monkeypatch):
    if kind == "input error" and reader in ("safetensors", "indexed"):
        pytest.skip("these do not read the content by themselves")
    name, read = READERS[reader]
    monkeypatch.chdir(tmp_path)                                      # a socket's name must be short
    make(kind, Path(name))
    path = str(tmp_path / name)
    line = line_of(read, path)
    assert line.startswith(path + ": ") and FOUND[kind] in line


@pytest.mark.parametrize("reader", READERS)
def test_impossible_names_and_forbidden_files(tmp_path, reader, monkeypatch):
    name, read = READERS[reader]
    for odd in ["a\0", "x" * 300, "\ud800", "a/" * 3000]:
        line_of(read, str(tmp_path / odd / name))
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr("builtins.open", fail_with(errno.EACCES))
    assert f"{name}: " in (line := line_of(read, str(tmp_path / name))) and "(Permission denied)" in line


def fail_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))
    return fail


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 13\n"
CONTENTS = {"nothing": b"", "pointer": POINTER, "page": b"\n<!DOCTYPE html>\n<html>Sign in</html>\n", "half a zip": b"PK\3\4" + bytes(60),
            "utf-16": '{"a": 1}'.encode("utf-16"), "noise": bytes(range(256)) * 4, "deep": b"[" * 100_000, "digits": b"[" + b"9" * 5000,
            "deep objects": b'{"a":' * 50_000, "a long line": b"x" * 100_000, "nul": bytes(1000), "a lone bracket": b"]"}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"text", "indexed", "digest"}))
def test_damaged_contents_are_one_line(tmp_path, reader, content):
    name, read = READERS[reader]
    path = tmp_path / name
    path.write_bytes(CONTENTS[content])
    if content == "nothing" and reader in ("answers", "row lines", "config file"):
        assert not read(str(path)) or reader == "config file"
        return
    assert name in (line := line_of(read, str(path)))
    if reader != "config file":                                      # it is a program, and its syntax is wrong
        assert ("git-lfs pointer" in line) == (content == "pointer") and ("web page" in line) == (content == "page")


def test_a_byte_order_mark_and_another_locale_change_nothing(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.json").write_bytes(mark + '{"a": "中"}'.encode())
    (tmp_path / "a.jsonl").write_bytes(mark + '{"a": "中"}\n'.encode())
    (tmp_path / "a.py").write_bytes(mark + 'name = "中"\n'.encode())
    assert files.read_json(tmp_path / "a.json") == {"a": "中"}
    assert [row for _, row in files.read_rows(tmp_path / "a.jsonl")] == [{"a": "中"}]
    assert load_config({"name": ""}, [str(tmp_path / "a.py")]).name == "中"
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_bytes(mark + (tmp_path / "tokenizer.json").read_bytes())
    assert read_tokenizer(tmp_path, 100).get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_printing_what_the_locale_cannot_spell(tmp_path, locale):
    program = ("import sys; sys.path.insert(0, '.'); from configurator import run, UserError\n"
               "def main(argv): print('中 \\ud800'); raise UserError(f'{argv[0]}: é')\nrun(main, '', {})")
    (tmp_path / "a.py").write_text(program, encoding="utf-8")
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, str(tmp_path / "a.py"), "x"], cwd=ROOT, env=environment, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"\\u4e2d \\ud800\n", b"error: x: \\xe9\n")


def test_a_tilde_is_the_home_folder(tmp_path, world, monkeypatch):
    monkeypatch.setenv("HOME", str(world))
    assert files.read_json("~/dense/config.json")["model_type"] == "llava"
    assert load_image("~/images/0.png").size == (30, 40)
    assert Llava.from_pretrained("~/dense").config.template == "vicuna"
    assert parse_sources("~/a.json:2, ~/b.jsonl") == [(f"{world}/a.json", 2.0), (f"{world}/b.jsonl", 1.0)]
    (tmp_path / "a.py").write_text("out_dir = '~/out'")
    defaults = {"out_dir": "", "prompt": "", "student": None}
    config = load_config(defaults, [str(tmp_path / "a.py"), "--student=~", "--prompt=~/x?"])
    assert config == {"out_dir": f"{world}/out", "student": str(world), "prompt": "~/x?"}


# -----------------------------------------------------------------------------
# Config files and flags

@pytest.mark.parametrize("text, expected", [
    ("import sys\nsys.exit(0)", "line 2: SystemExit, 0"),
    ("quit()", "line 1: SystemExit"),
    ("\nraise BaseExceptionGroup('several', [KeyboardInterrupt(), ValueError()])", "line 2: BaseExceptionGroup, several (2 sub"),
    ("raise GeneratorExit", "line 1: GeneratorExit"),
    ("class _A:\n    def __repr__(self): return 1 / 0\nlr = _A()", "lr: found _A (its repr fails: ZeroDivisionError), expected float"),
    ("class A(Exception):\n    def __str__(self): raise self\nraise A()", "line 3: A, (its str fails: A)"),
    ("def f(): f()\nf()", "RecursionError"),
    ("lr = " + "9" * 4000, "lr: found int 999"),
    ("lr = 10 ** 400", "expected float of at most 64 bits"),
    ("n = 2 ** 63", "n: found int 9223372036854775808, expected int of at most 64 bits"),
    ("n = 'long' * 999", "n: found str 'longlong"),
    ("(" * 5000, ": "),
    ("\0", ": "),
    ("# coding: nonsense\n", ": "),
])
def test_config_files_that_end_in_any_way(tmp_path, text, expected):
    path = tmp_path / "a.py"
    path.write_text(text)
    line = line_of(load_config, {"lr": 1.0, "n": 1}, [str(path)])
    assert line.startswith(str(path)) and expected in line and len(line) < 400


def test_numbers_that_no_library_can_hold(world):
    assert "expected int of at most 64 bits" in line_of(load_config, {"seed": 0}, ["--seed=100000000000000000000"])
    assert len(line_of(load_config, {"seed": 0}, ["--seed=" + "9" * 9000])) < 200
    for weight in ("1e12", "1001", "1e300", "inf", "nan"):
        assert "at most 1,000" in line_of(parse_sources, f"a.json:{weight}")
    line = line_of(Sampler, [1] * 2_000_001, 8, 0, [(0, 2_000_001, 1000.0)])
    assert "2,000,001,000 rows" in line and "32 GB" in line and "lower the weights" in line
    data = InstructionData([(str(world / "rows.json"), 1.0)], str(world / "images"), Llava.from_pretrained(world / "dense").tokenizer,
                           "vicuna", 4, 28, 3_000_000_000)
    assert len(data) == 32


def test_what_would_not_fit_is_said_before_it_is_tried(world):
    model = Llava.from_pretrained(world / "dense")
    for number in (1001, 100_000, 10**9, 10**15):
        assert f"num_experts={number:,}" in (line := line_of(upcycle, model, number, 2)) and " would take " in line
    assert model.config.decoder.num_experts == 0
    ids = torch.tensor([[5, 6, 7]])
    line = line_of(lambda: next(model.stream(ids, max_new_tokens=10**13)))
    assert line.startswith("max_new_tokens=10,000,000,000,000: its KV cache would take ") and "GB of memory" in line
    require_memory(10**18, "a description", torch.device("meta"))


@pytest.mark.parametrize("temperature", ["1e-42", "1e-320", "1e-4", "1e300", "inf", "nan", "-1"])
def test_a_temperature_that_logits_can_be_divided_by(world, tmp_path, temperature):
    model = f"--model={world / 'dense'}"
    line = line_of(sample.main, [model, "--prompt=a", "--device=cpu", f"--temperature={temperature}"])
    assert line.startswith("temperature is ") and line.endswith("expected a non-negative number: 0, or from 0.001 to 1000")
    assert line == line_of(answer.main, [model, f"--data={world / 'rows.json'}", f"--out={tmp_path / 'a.json'}",
                                         "--device=cpu", f"--temperature={temperature}"])


@pytest.mark.parametrize("tensor, factor", [("decoder.blocks.1.ffn.down_proj", 1e5), ("adaptor.linear_2", 1e6),
                                            ("decoder.norm", 1e5)])
def test_logits_that_overflow_give_no_answer(world, tensor, factor):
    model = Llava.from_pretrained(world / "dense")
    with torch.no_grad():
        model.get_submodule(tensor).weight.mul_(factor)
    ids = torch.tensor([[5, 6] + [model.config.image_token_id] * 4 + [7]])
    pixels = torch.zeros(1, 3, 28, 28)
    assert model.generate(ids, pixels, max_new_tokens=2).shape == (1, 2)                         # fp32 has the range
    model.half()
    line = line_of(model.generate, ids, pixels, max_new_tokens=2)
    assert line.startswith("the model's logits are NaN or infinite in torch.float16")


def test_sample_checks_its_values(world, tmp_path, capsys, monkeypatch):
    base = [f"--model={world / 'dense'}", "--device=cpu"]
    os.mkfifo(tmp_path / "pipe.png")
    for wrong in ("--max_new_tokens=-1", "--max_new_tokens=0", "--temperature=nan", "--temperature=inf", "--temperature=-0.1",
                  "--device=nonsense", f"--image={tmp_path / 'pipe.png'}", "--image=/dev/zero", "--prompt=a \ud800"):
        line_of(sample.main, [*base, "--prompt=what ?", wrong])
    for more in ([], [f"--image={world / 'images' / '0.png'}"]):
        sample.main([*base, *more, "--max_new_tokens=3", "--prompt=<image> what does <image> mean ?"])
    capsys.readouterr()

    def undecodable(_):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    monkeypatch.setattr("builtins.input", undecodable)
    assert "not text" in line_of(sample.main, base)


# -----------------------------------------------------------------------------
# Rows as others write them

def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


PAIR = {"idx": 1, "question": "what is there ?", "chosen": "a cat", "rejected": "a dog"}


@pytest.mark.parametrize("row", [
    PAIR | {"image": None, "image_path": "0.png"}, PAIR | {"image": "", "image_path": "0.png"},
    PAIR | {"image": [], "image_path": ["0.png"]}, PAIR | {"image_path": "0.png"}, PAIR | {"image": ["0.png"], "image_path": "x"},
    {"image": None, "image_path": "0.png", "chosen": turns("<image>\nwhat ?", "a"), "rejected": turns("<image>\nwhat ?", "b")},
])
def test_a_pair_is_shown_its_picture(row):
    names, [chosen, rejected] = parse_pair(row)
    assert names == ["0.png"] and chosen[0] == rejected[0] and chosen[0]["value"].startswith("<image>\nwhat")


@pytest.mark.parametrize("key, value", [
    ("images", ["0.png"]), ("image_file", "0.png"), ("Image", "0.png"), ("image_url", "http://x/0.png"), ("img", "0.png"),
    ("img_path", "0.png"), ("imagePath", "0.png"), ("picture", {"bytes": "..."}), ("photo", "0.png"), ("image_list", [{"path": "0.png"}])])
def test_no_row_is_trained_without_the_picture_that_it_names(key, value):
    for null in ({}, {"image": None}, {"image": []}):
        for parse, row in [(parse_pair, PAIR), (parse_instruction, {"conversations": turns("what is there ?", "a cat")})]:
            assert f'"{key}" is ' in line_of(parse, row | null | {key: value})
            assert parse(row | null | {key: None, "image_id": 17, "image_size": None, "n_images": 0})[0] == []   # no pictures
    with_picture = {"image": "0.png", "conversations": turns("<image>\nwhat ?", "a cat"), key: value}
    assert parse_instruction(with_picture)[0] == ["0.png"]


@pytest.mark.parametrize("key, value", [
    ("video", "a.mp4"), ("audio", ["a.wav"]), ("video_path", "a"), ("media", ["0.png"]), ("frames", ["1", "2"]),
    ("files", ["0.PNG"]), ("path", "a/0.jpeg"), ("file_name", "0.webp"), ("url", "https://x/0.jpg?s=1"),
    ("file", {"path": "0.gif", "bytes": None})])
def test_no_row_is_trained_without_what_it_shows(key, value):
    assert f'"{key}" is ' in line_of(parse_instruction, {"conversations": turns("what is there ?", "a cat"), key: value})
    assert f'"{key}" is ' in line_of(parse_pair, PAIR | {key: value})


@pytest.mark.parametrize("more", [
    {"path": "dialogs/7.json"}, {"file": "rows.jsonl"}, {"url": "https://x/page.html"}, {"source": "a.png"},
    {"media_type": "text"}, {"path": None, "video": "", "audio": []}, {"system": ""}, {"system": None}])
def test_other_keys_of_a_row_do_not_matter(more):
    row = {"conversations": turns("what is there ?", "a cat")}
    assert parse_instruction(row | more) == parse_instruction(row)


MESSAGES = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "a cat"}]


@pytest.mark.parametrize("row, found", [
    ({"conversations": turns("Picture 1: <img>0.png</img>\nwhat ?", "a cat")}, "found \"<img>0.png</img>\" in a question"),
    ({"system": "you are blue", "conversations": turns("what ?", "a cat")}, '"system" is "you are blue"'),
    ({"system_prompt": "you are blue", "messages": MESSAGES}, '"system_prompt" is "you are blue"'),
    ({"messages": [MESSAGES[0], MESSAGES[1] | {"loss": False}]}, 'found "loss": false'),
    ({"messages": [MESSAGES[0], MESSAGES[1] | {"weight": 0}]}, 'found "weight": 0'),
    ({"conversations": [turns("what ?")[0], {"from": "gpt", "value": "a cat", "train": False}]}, 'found "train": false'),
    ({"conversations": turns("what ?", "a dog"), "messages": MESSAGES}, '"conversations" is '),
    ({"conversations": [turns("what ?")[0], {"from": "gpt", "value": "a cat", "content": "a dog"}]},
     '"value" is "a cat" and "content" is "a dog", expected only one of them'),
    ({"conversations": [turns("what ?")[0], {"from": "gpt", "role": "user", "value": "a cat"}]},
     '"from" is "gpt" and "role" is "user"'),
])
def test_what_a_row_says_twice_or_would_be_ignored_is_an_error(row, found):
    assert found in line_of(parse_instruction, row)


def test_what_a_row_says_twice_alike_is_none():
    twice = [{"from": "human", "role": "user", "value": "what ?", "content": "what ?"},
             {"from": "gpt", "role": "assistant", "value": "a cat", "content": [{"type": "text", "text": "a cat"}],
              "loss": True, "weight": 1}]
    _, [conversation] = parse_instruction({"conversations": twice})
    assert [turn["value"] for turn in conversation] == ["what ?", "a cat"]
    both = {"conversations": turns("what ?", "a cat"), "messages": MESSAGES}
    assert parse_instruction(both) == ([], [turns("what ?", "a cat")])


@pytest.mark.parametrize("key", ["question", "prompt"])
def test_a_question_beside_whole_dialogues_is_theirs(key):
    pair = {"image": "0.png", "chosen": turns("<image>\nwhat ?", "a cat"), "rejected": turns("<image>\nwhat ?", "a dog")}
    for same in ("what ?", "<image> what ?", "", None, 7, MESSAGES[:1], turns("<image>\nwhat ?")):
        assert parse_pair(pair | {key: same})[1] == [pair["chosen"], pair["rejected"]]
    for other in ("a dog ?", MESSAGES[:1] + [{"role": "user", "content": "a dog ?"}]):
        assert f'"{key}" is ' in line_of(parse_pair, pair | {key: other})
    assert '"prompt" is "a dog ?", which the human turns of the pair do not say' in line_of(
        parse_pair, PAIR | {"prompt": "a dog ?"})


@pytest.fixture(scope="module")
def tokenizer(world):
    return Llava.from_pretrained(world / "dense").tokenizer


def text_of(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "")


@pytest.mark.parametrize("texts, images", [
    (("what is in the <image> tag ?", "a cat"), []), (("what ?", "the <image> tag"), []), (("what ?", "<image>"), []),
    (("an <image>, two <image>s ?", "<image><image>"), []), (("<image>\nwhat ?", "use <image> here"), ["0.png"]),
    (("<image>\nwhat ?", "<image>", "and <image>", "a <image>\n<image>"), ["0.png", "1.png"]),
    (("see <<image>image> and <ima<image>ge> ?", "yes"), []),
])
@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_image_is_text_where_no_image_is_meant(tokenizer, texts, images, template):
    names, [conversation] = parse_instruction({"image": images, "conversations": turns(*texts)})
    ids, mask = render(conversation, tokenizer, template, image_tokens=4)
    image_id = tokenizer.token_to_id("<image>")
    assert names == images and ids.count(image_id) == 4 * len(images) and len(ids) == len(mask)
    # The same row with another word there has the same tokens around it and the same mask.
    plain = [turn | {"value": turn["value"].replace("<image>", "<cat>") if turn["from"] == "gpt" or not images else turn["value"]}
             for turn in turns(*texts)]
    other, other_mask = render(plain, tokenizer, template, image_tokens=4)
    unknown, cat = tokenizer.token_to_id("<unk>"), tokenizer.token_to_id("cat")
    image = tokenizer.token_to_id("image")
    if "ima<" not in texts[0]:
        assert [cat if token == image else token for token in ids] == other and mask == other_mask and unknown in ids
    length, _ = index.measure(conversation, tokenizer, template, 4)
    assert length == len(ids)


def test_a_lost_picture_is_still_an_error():
    for question in ("<image>\nwhat ?", "what ?\n<image>", "<image>", " <image> what ?"):
        assert "1 <image> in the text but 0 images" in line_of(parse_instruction, {"conversations": turns(question, "a")})
    assert "2 <image> in the text but 1 images" in line_of(
        parse_instruction, {"image": "0.png", "conversations": turns("<image> what is <image> ?", "a")})
    assert as_text("a <image>").replace("\ufdd0", "") == "a <image>" and "<image>" not in as_text("<image><image>")


def test_all_wrong_rows_of_a_file_are_told_at_once(world, tmp_path, tokenizer):
    good = {"id": "g", "conversations": turns("what ?", "a cat")}
    rows = [good, *({"id": i, "image": f"gone{i}.png", "conversations": turns("<image> ?", "a")} for i in range(3)), good, {"id": "x"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    build = lambda name: InstructionData([(str(tmp_path / name), 1.0)], str(world / "images"), tokenizer, "vicuna", 4, 28, 99)
    line = line_of(build, "a.json")
    assert line.startswith(f"{tmp_path}/a.json row 1 id 0: image ") and line.endswith("; 3 more rows are wrong: 2, 3, 5")
    (tmp_path / "b.jsonl").write_text("\n".join(["{}"] * 500))
    assert line_of(build, "b.jsonl").endswith("; 499 more rows are wrong: 1, 2, 3, 4, 5, ...")
    assert not list(tmp_path.glob("*.index"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "c.json").write_text(json.dumps([{"image": str(tmp_path / "pipe.png"), "conversations": turns("<image>", "a")}]))
    assert "does not exist as a file" in line_of(build, "c.json")


def test_a_text_that_the_tokenizer_cannot_encode(tmp_path):
    content = json.loads(make_tokenizer().to_str())
    del content["model"]["vocab"]["<unk>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(tmp_path, 100)
    assert "the tokenizer cannot encode the text" in line_of(render, turns("xyz", "a"), tokenizer)


def test_preference_rows_of_text_with_image_in_an_answer(world, tmp_path, tokenizer):
    (tmp_path / "p.json").write_text(json.dumps([PAIR | {"question": "an <image> tag ?", "chosen": "<image> is", "rejected": "no <image>"}]))
    [pair] = PreferenceData([(str(tmp_path / "p.json"), 1.0)], "", tokenizer, "vicuna", 4, 28, 99)
    assert tokenizer.token_to_id("<image>") not in pair["chosen_ids"] + pair["rejected_ids"] and pair["images"] == []
