"""
Damaged, cut, edited or simply wrong files: whatever is done to a checkpoint, a run's records or a config, reading it
ends in a correct result or in one line that names the file or the key. Never in another exception, a hang, or a lost
file.

    python -m pytest tests/robustness/test_fuzz_files.py
"""
import json
import os
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import train
from configurator import UserError, load_config
from data import MAX_PIXELS, load_image, transform_image
from engine import resume
from engine.hf import save_tensors
from model import Llava
from test_train import flags

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))    # of each test; set it higher to search longer
fuzz = lambda test: settings(max_examples=EXAMPLES, deadline=5000, derandomize="FUZZ_EXAMPLES" not in os.environ,
                             suppress_health_check=list(HealthCheck))(test)

# What may stand in a JSON file where something else was expected.
VALUES = st.one_of(st.none(), st.booleans(), st.sampled_from([0, 1, -1, 2, 3, 7, 10**5, 10**8, 2**31, 2**63, 10**30, 1e400, -0.5, 1e-300]),
                   st.integers(-9, 99), st.floats(), st.text(string.printable, max_size=5), st.just([]), st.just({}),
                   st.lists(st.integers(-3, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
                   st.sampled_from(["llava", "qwen2", "qwen2_moe", "silu", "../x", "/", "model.safetensors", "default", "\ud800", "a\0", "x" * 300, "yarn"]))


def paths(node, at=()):
    """Every place in a JSON document."""
    found = [at] if at else []
    if isinstance(node, (dict, list)):
        for key in (node if isinstance(node, dict) else range(len(node))):
            found += paths(node[key], (*at, key))
    return found


@st.composite
def edited_json(draw, text):
    """One to three places of a document replaced, removed, or joined by an unknown key."""
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places = paths(document)
        if not places:
            break
        *parents, key = draw(st.sampled_from(places))
        node = document
        for parent in parents:
            node = node[parent]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            node[key] = draw(VALUES)
        elif action == "remove":
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.text(string.ascii_letters, min_size=1, max_size=8))] = draw(VALUES)
    return json.dumps(document).encode()


@st.composite
def damaged_bytes(draw, content):
    """Cut, emptied, with a few bytes changed, a stretch doubled, or zeros where a disk lost a block."""
    content = bytearray(content)
    where = draw(st.one_of(st.integers(0, min(len(content), 400)), st.integers(0, len(content))))
    action = draw(st.sampled_from(["cut", "flip", "flip", "flip", "double", "zero", "append"]))
    if action == "cut":
        return bytes(content[:where])
    if action == "flip":
        for _ in range(draw(st.integers(1, 4))):
            content[min(where, len(content) - 1)] ^= draw(st.integers(1, 255))
            where = draw(st.integers(0, len(content) - 1))
    elif action == "double":
        content[where:where] = content[where:where + 50]
    elif action == "zero":
        content[where:where + 64] = bytes(len(content[where:where + 64]))
    else:
        content += draw(st.binary(min_size=1, max_size=20))
    return bytes(content)


def mutated(path):
    content = path.read_bytes()
    ways = [damaged_bytes(content)]
    if path.suffix == ".json":
        ways += [edited_json(content.decode())] * 3
    return st.one_of(ways)


def one_line(error, *names):
    """The promise of every message: one line, and it names the file, the folder or the key."""
    text = str(error)
    assert "\n" not in text and any(str(name) in text for name in names), text


def with_file(source, folder, name, content):
    """A copy of a folder in which one file has other content; hard links, but for that one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, copy_function=os.link)
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    """The dense student in one file, and the sparse one in shards."""
    sharded = tmp_path_factory.mktemp("sharded") / "sparse"
    shutil.copytree(world / "sparse", sharded)
    save_tensors(load_file(world / "sparse" / "model.safetensors"), sharded, max_shard_bytes=150_000)
    assert len(list(sharded.glob("model-*"))) == 4
    pickled = shutil.copytree(world / "dense", tmp_path_factory.mktemp("pickled") / "dense")
    tensors = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    shards = shutil.copytree(pickled, tmp_path_factory.mktemp("pickled") / "shards")
    torch.save(tensors, pickled / "pytorch_model.bin")
    weight_map = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        torch.save({key: tensors[key] for key in tensors if weight_map[key] == name}, shards / name)
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {"dense": world / "dense", "sparse": sharded, "pickled": pickled, "pickled shards": shards}


CASES = [("dense", "config.json"), ("dense", "generation_config.json"), ("pickled", "pytorch_model.bin"),
         ("pickled shards", "pytorch_model.bin.index.json"), ("sparse", "config.json"), ("dense", "tokenizer.json"), ("dense", "model.safetensors"),
         ("sparse", "model.safetensors.index.json"), ("sparse", "model-00002-of-00004.safetensors")]


@pytest.mark.parametrize("which, name", CASES)
def test_checkpoints(checkpoints, tmp_path, which, name):
    ids = torch.tensor([[5, 6, 7, 8]])
    original = Llava.from_pretrained(checkpoints[which])
    weights = {name: parameter.detach().clone() for name, parameter in original.named_parameters()}

    @fuzz
    @given(mutated(checkpoints[which] / name))
    def check(content):
        folder = with_file(checkpoints[which], tmp_path / "copy", name, content)
        try:
            llava = Llava.from_pretrained(folder)
        except UserError as error:
            one_line(error, folder)
            return
        # It opened. Then it is a complete model: it runs, and unless the weight file was changed, its weights are equal.
        assert llava(ids).shape[:2] == ids.shape
        if name.endswith(".json"):
            assert all(torch.equal(parameter, weights[key]) for key, parameter in llava.named_parameters())
    check()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("part", ["clip", "qwen"])
def test_parts(clip_folder, qwen_folder, tmp_path, part, name):
    folders = {"clip": clip_folder, "qwen": qwen_folder}
    if not (folders[part] / name).exists():
        return

    @fuzz
    @given(mutated(folders[part] / name))
    def check(content):
        copies = folders | {part: with_file(folders[part], tmp_path / "copy", name, content)}
        try:
            llava = Llava.from_parts(copies["clip"], copies["qwen"])
        except UserError as error:
            one_line(error, copies[part])
            return
        assert llava(torch.tensor([[5, 6, 7, 8]])).shape[:2] == (1, 4)
    check()


@pytest.fixture(scope="module")
def interrupted(world, tmp_path_factory):
    """A run killed after its last save: states of step 1 and 2, run.json and log.jsonl of an unfinished run."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    arguments = flags(world, "align", out, max_steps=2, save_every=1)
    train.main(arguments)
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"finished": False}))
    return out, load_config(train.DEFAULTS, arguments)


def test_states(interrupted, tmp_path):
    out, config = interrupted
    newest = out / "state" / "step_00000002.pt"
    original = resume.read_state(newest)["weights"]

    @fuzz
    @given(mutated(newest))
    def check(content):
        folder = with_file(out, tmp_path / "copy", "state/step_00000002.pt", content)
        finished, state, note = resume.begin_or_resume(folder, config, train.MAY_CHANGE)
        assert not finished and resume.step_of(state) == (1 if note else 2)
        if note:
            one_line(note, folder / "state" / "step_00000002.pt")
            assert "continuing from step 1" in note
        else:                                                        # some bytes of the format mean nothing
            weights = resume.read_state(state)["weights"]
            assert all(torch.equal(weights[name], original[name]) for name in original)
        assert (folder / "state" / "step_00000002.pt").read_bytes() == content     # read, not modified
    check()


def test_run_json(interrupted, tmp_path):
    out, config = interrupted

    @fuzz
    @given(mutated(out / "run.json"))
    def check(content):
        folder = with_file(out, tmp_path / "copy", "run.json", content)
        try:
            finished, state, note = resume.begin_or_resume(folder, config, train.MAY_CHANGE)
            assert finished or (resume.step_of(state) == 2 and not note)
        except UserError as error:
            one_line(error, folder)
    check()


def test_logs(interrupted, tmp_path):
    """Whatever the log holds, what is left of it are whole records up to the step, in their old order."""
    out, _ = interrupted
    lines = (out / "log.jsonl").read_text().splitlines()

    @fuzz
    @given(mutated(out / "log.jsonl"))
    def check(content):
        folder = with_file(out, tmp_path / "copy", "log.jsonl", content)
        resume.go_back(folder, 1)
        for line in (folder / "log.jsonl").read_text().splitlines():
            assert json.loads(line)["step"] <= 1
        if content.startswith((lines[0] + "\n").encode()):
            assert (folder / "log.jsonl").read_text().splitlines()[0] == lines[0]
    check()


KEYS = st.one_of(st.sampled_from(sorted(train.DEFAULTS)), st.text(string.ascii_letters + "_-=.", max_size=9))
TEXTS = st.one_of(st.text(string.printable, max_size=8), st.sampled_from(["True", "1e400", "nan", "-1", "0", "9" * 5000, "align",
                                                                       "pd", "cpu", "a.json:0"]))


@fuzz
@given(st.lists(st.one_of(st.builds("--{}={}".format, KEYS, TEXTS), st.builds("--{}".format, KEYS),
                          st.text(string.printable, max_size=6).filter(lambda text: "/" not in text)), max_size=4))
def test_flags(arguments):
    try:
        config = load_config(train.DEFAULTS, arguments)
        train.check_settings(config)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert config.keys() == train.DEFAULTS.keys()
    assert all(type(config[key]) is type(value) for key, value in train.DEFAULTS.items())


CONFIG = (Path(train.__file__).parent / "config" / "d2s.py").read_bytes()


@fuzz
@given(st.one_of(damaged_bytes(CONFIG), st.builds("{} = {}\n".format, KEYS, st.one_of(VALUES.map(repr), TEXTS)).map(
    lambda line: CONFIG + line.encode())))
def test_config_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "config.py"
    path.write_bytes(content)
    try:
        config = load_config(train.DEFAULTS, [str(path)])
        train.check_settings(config)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert all(type(config[key]) is type(value) for key, value in train.DEFAULTS.items())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A small picture in several formats and modes."""
    folder, noise = tmp_path_factory.mktemp("pictures"), Image.effect_noise((24, 17), 90)
    levels = np.arange(24 * 17).reshape(17, 24)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tiff"):
        noise.convert("RGB").save(folder / name)
    Image.fromarray((levels * 150).astype(np.uint16)).save(folder / "16.png")
    Image.fromarray((levels / 500).astype(np.float32)).save(folder / "float.tiff")
    noise.convert("P").save(folder / "palette.png", transparency=3)
    return folder


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tiff", "16.png", "float.tiff", "palette.png"])
def test_images(pictures, tmp_path, name):
    path = tmp_path / name

    @fuzz
    @given(damaged_bytes((pictures / name).read_bytes()))
    def check(content):
        path.write_bytes(content)
        try:
            image = load_image(str(path))
        except UserError as error:
            one_line(error, path)
            return
        assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS
        if image.width * image.height < 10**6:
            assert transform_image(image, 28).isfinite().all()
    check()
