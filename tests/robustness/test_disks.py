"""
Disks that are full, read-only, forbidden or that lose power: every write of a run, one after the other.

    python -m pytest tests/robustness/test_disks.py
"""
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny.__main__ as tiny
import train
from configurator import UserError
from engine import files, resume, teacher_cache
from engine.files import atomic, claim, make_folder, release
from engine.index import open_index
from model import Llava
from test_faults import same
from test_train import flags


@pytest.mark.parametrize("name", ["folder", "pipe", "link", "nowhere"])
def test_only_a_file_is_replaced_by_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("link").symlink_to("/dev/null")
    Path("nowhere").symlink_to("a file that does not exist")
    with pytest.raises(UserError, match=f"{name}: is there already, and is not a file"):
        files.write_text(name, "x")
    assert sorted(os.listdir()) == ["folder", "link", "nowhere", "pipe"] and Path("pipe").is_fifo()
    assert Path("link").is_symlink() and Path("nowhere").is_symlink()


# -----------------------------------------------------------------------------
# Each file operation of a run fails once

def commands(world, folder):
    """What is watched: a run with a teacher cache, whose data is indexed, in folders that do not exist yet."""
    shutil.copy(world / "rows.json", folder / "rows.json")
    return flags(world, "d2d", folder / "out", max_steps=1, data=folder / "rows.json",
                 teacher_cache=folder / "cache")


OPERATIONS = [(os, "replace"), (os, "fsync"), (os, "mkdir"), (Path, "touch"), (files.fcntl, "lockf")]


class Disk:
    """Counts the operations below `folder`; the one with the number `fail` raises."""

    def __init__(self, patch, folder, fail=None, error=errno.ENOSPC):
        self.calls, self.fail, self.error, self.folder = [], fail, error, str(folder)
        for module, name in OPERATIONS:
            patch.setattr(module, name, self.watch(name, getattr(module, name)))

    def watch(self, name, original):
        def operation(*args, **more):
            file = args[0].fileno() if hasattr(args[0], "fileno") else args[0]
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
            if path.startswith(self.folder):
                self.calls.append((name, path.removeprefix(self.folder)))
                if len(self.calls) - 1 == self.fail:
                    raise OSError(self.error, os.strerror(self.error), path)
            return original(*args, **more)
        return operation


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The run without a fault, and the operations that it consists of."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = commands(world, folder)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, folder)
        train.main(arguments)
    return folder, disk.calls


NAMED = ("lock", "run.json", "log.jsonl", "teacher_cache.json", "rows-", "step_", "model.safetensors", "index")


def one_of_each(calls):
    """The first operation of each kind on each kind of file, and the very last."""
    first = {}
    for number, (operation, path) in enumerate(calls):
        kind = next((name for name in NAMED if name in path), "another file" if "." in path else path)
        first.setdefault((operation, kind), number)
    return [*first.values(), len(calls) - 1]


def test_whatever_write_fails_the_run_ends_in_one_line_and_goes_on_later(world, whole, tmp_path):
    calls = whole[1]
    names = {Path(path).name for _, path in calls}
    assert {"lock", "run.json.tmp", "teacher_cache.json.tmp", "rows-000000000.safetensors.tmp", "model.safetensors.tmp",
            "step_00000001.pt.tmp", "config.json.tmp", "log.jsonl"} <= names
    assert calls[-2:] == [("replace", "/out/run.json.tmp"), ("fsync", "/out")]          # run.json at the very end
    numbers = one_of_each(calls)
    errors = [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT]
    for i, number in enumerate(numbers):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = commands(world, folder)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, folder, number, errors[i % len(errors)])
            with pytest.raises(UserError) as caught:
                train.main(arguments)
        assert "cannot be written (" in str(caught.value) and "\n" not in str(caught.value), calls[number]
        assert not list(folder.rglob("*.tmp")), calls[number]
        if i % 6 == 0 or number == numbers[-1]:                      # nothing that a later run stumbles over
            train.main(arguments)
            same(whole[0] / "out", folder / "out")
        shutil.rmtree(folder)


def test_nothing_gets_its_name_before_it_is_on_the_disk(whole):
    """Every rename is after an fsync of the file and before one of its folder; new folders are flushed as well."""
    calls = whole[1]
    renamed = [i for i, (name, _) in enumerate(calls) if name == "replace"]
    assert len(renamed) >= 14
    for i in renamed:
        path = calls[i][1]
        assert ("fsync", path) in calls[:i], f"{path}: renamed before it was flushed"
        assert ("fsync", str(Path(path).parent).rstrip("/")) in calls[i:], f"{path}: its name was not flushed"
    for i, (name, path) in enumerate(calls):
        if name == "mkdir":
            assert ("fsync", str(Path(path).parent).rstrip("/")) in calls[i:], f"{path}: its name was not flushed"
    for state in [i for i in renamed if ".pt." in calls[i][1]]:
        assert ("fsync", "/out/log.jsonl") in calls[:state]          # no state ahead of the log
    assert calls.index(("fsync", "/out/lock")) < min(i for i in renamed if calls[i][1].startswith("/out/"))


def test_the_folders_of_a_world_are_flushed_before_they_get_their_names(tmp_path, monkeypatch):
    calls = []
    original = os.replace
    monkeypatch.setattr(os, "sync", lambda: calls.append("sync"))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append(Path(paths[1]).name) or original(*paths))
    tiny.main([f"--out_dir={tmp_path}", "--part=world", "--scale=0.001"])
    order = [name for name in calls if name in ("sync", "train", "bench", "bench_unseen", "world.json")]
    assert order == ["sync", "bench", "bench_unseen", "train", "world.json"]


# -----------------------------------------------------------------------------
# Places where nothing can be written

@pytest.mark.parametrize("key", ["out_dir", "teacher_cache"])
@pytest.mark.parametrize("kind", ["a file", "below a file", "a dangling link", "a long name", "read-only", "forbidden"])
def test_a_place_that_cannot_be_a_folder_ends_in_one_line(world, tmp_path, monkeypatch, key, kind):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "there")
    place = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "a dangling link": tmp_path / "dangling",
             "a long name": tmp_path / ("n" * 300), "read-only": "/proc/here", "forbidden": tmp_path / "forbidden"}[kind]
    if kind == "forbidden":                                          # root may read everything: as if it were someone else
        original = os.stat

        def stat(path, *args, **more):
            if str(path).startswith(str(place)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return original(path, *args, **more)
        monkeypatch.setattr(os, "stat", stat)
    settings = dict(out_dir=tmp_path / "out", teacher_cache=tmp_path / "cache", max_steps=1) | {key: place}
    with pytest.raises(UserError) as caught:
        train.main(flags(world, "d2d", **settings))
    assert str(place) in str(caught.value) and "cannot be written (" in str(caught.value)
    assert "\n" not in str(caught.value) and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["a file", "below a file", "a dangling link", "below a dangling link"])
def test_an_out_dir_that_cannot_be_a_folder_is_refused_before_anything_is_loaded(world, tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    place = tmp_path / ("file" if kind.endswith("file") else "dangling") / ("x/y" if kind.startswith("below") else "")
    monkeypatch.setattr(train, "open_student", lambda *_: pytest.fail("loaded a model first"))
    with pytest.raises(UserError, match=f"^{place}: cannot be written .Not a directory."):
        train.main(flags(world, "d2d", place))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("number, reason", [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied"),
                                            (errno.ENOSPC, "No space left on device"), (errno.EIO, "Input/output error")])
def test_an_index_that_cannot_be_written(tmp_path, monkeypatch, number, reason):
    """Before the first row is measured; the data file stays as it was, and nothing is left."""
    (tmp_path / "rows.json").write_text('[{"id": 1}]')

    def touch(path, *args, **more):
        raise OSError(number, os.strerror(number), str(path))
    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(UserError) as caught:
        open_index(str(tmp_path / "rows.json"), {}, None)
    assert f"cannot be written ({reason})" in str(caught.value) and "make the folder writable" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_free_space_is_told_wherever_the_path_leads(tmp_path):
    for path in (tmp_path / "a" / "b", Path("/"), Path("/proc/x/y"), Path("relative")):
        with pytest.raises(UserError, match=r"cannot be written \(Input/output error\); [\d.,]+ (bytes|.B) are free there"):
            with files.disk_errors(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_folder_is_made_with_its_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (Path("a/b/c"), tmp_path / "d" / "e", Path(".")):
        make_folder(place)
        assert place.is_dir()
    with atomic(Path("f/g")) as tmp:
        tmp.write_text("x")
    assert (tmp_path / "f" / "g").read_text() == "x"


@pytest.mark.parametrize("path", ["", ".", "/", Path("")])
def test_a_name_that_names_no_file(path):
    with pytest.raises(UserError, match="names no file to write; give the name of one"):
        files.write_json(path, {})


# -----------------------------------------------------------------------------
# The teacher cache: what is read is what was written

@pytest.fixture(scope="module")
def filled(world, tmp_path_factory):
    """A cache of four files, and one of other data."""
    folder = tmp_path_factory.mktemp("filled")
    rows = json.loads((world / "rows.json").read_text())
    (folder / "other.json").write_text(json.dumps(rows[::-1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "ROWS_PER_FILE", 8)
        for name, data in (("cache", world / "rows.json"), ("other", folder / "other.json")):
            train.main(flags(world, "d2d", folder / f"out_{name}", max_steps=4, data=data, teacher_cache=folder / name))
    return folder


def first(folder):
    return folder / "rows-000000000.safetensors"


def change(name, function):
    """Write a file anew with one of its tensors changed, and everything else as it was."""
    def damage(folder, filled):
        from safetensors import safe_open
        with safe_open(first(folder), framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(first(folder))
        new = function(tensors.pop(name).clone())
        if new is not None:
            tensors[name] = new.contiguous()
        save_file(tensors, first(folder), metadata=metadata)
    return damage


def at(value):
    def function(tensor):
        tensor.view(-1)[5] = value
        return tensor
    return function


def flip(place):
    def damage(folder, filled):
        content = bytearray(first(folder).read_bytes())
        content[int(place * len(content)) if place < 1 else -1] ^= 4
        first(folder).write_bytes(content)
    return damage


def swap(folder, filled):
    second = folder / "rows-000000008.safetensors"
    one, two = first(folder).read_bytes(), second.read_bytes()
    first(folder).write_bytes(two)
    second.write_bytes(one)


DAMAGE = {
    "an id beyond the vocabulary": change("teacher_ids", at(1_000_000)),
    "another id": change("teacher_ids", at(3)),
    "NaN": change("teacher_logprobs", at(torch.nan)),
    "another number": change("teacher_tail", at(-1.0)),
    "no tail": change("teacher_tail", lambda tensor: None),
    "offsets reversed": change("row_offsets", lambda tensor: tensor.flip(0)),
    "offsets of fewer rows": change("row_offsets", lambda tensor: tensor[:-1]),
    "another dtype": change("teacher_logprobs", lambda tensor: tensor.half()),
    "another shape": change("teacher_logprobs", lambda tensor: tensor.T),
    "no checksum": lambda folder, filled: save_file(load_file(first(folder)), first(folder)),
    "a bit of the header": flip(0.003),
    "a bit in the middle": flip(0.5),
    "the last byte": flip(1),
    "swapped": swap,
    "another data set's": lambda folder, filled: shutil.copy(first(filled / "other"), first(folder)),
    "all of another data set's": lambda folder, filled: [shutil.copy(path, folder) for path in (filled / "other").glob("rows-*")],
    "empty": lambda folder, filled: first(folder).write_bytes(b""),
    "a folder": lambda folder, filled: first(folder).unlink() or first(folder).mkdir() or (first(folder) / "x").write_text("x"),
    "the record": lambda folder, filled: (folder / "teacher_cache.json").write_text(
        (folder / "teacher_cache.json").read_text().replace('"vocabulary": 64', '"vocabulary": 63')),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_cache_that_is_not_what_was_written_is_refused(world, filled, tmp_path, monkeypatch, kind):
    """Before the first step, whether the teacher is there or not."""
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 8)
    folder = shutil.copytree(filled / "cache", tmp_path / "cache")
    DAMAGE[kind](folder, filled)
    for teacher in (world / "teacher", tmp_path / "gone"):
        with pytest.raises(UserError) as caught:
            train.main(flags(world, "d2d", tmp_path / "out", max_steps=4, teacher_cache=folder, teacher=teacher))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_filled_again_once_it_is_deleted(world, filled, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 8)
    folder = shutil.copytree(filled / "cache", tmp_path / "cache")
    flip(0.5)(folder, filled)
    arguments = flags(world, "d2d", tmp_path / "out", max_steps=4, teacher_cache=folder)
    with pytest.raises(UserError, match="its checksum is wrong.; delete it, and the next run fills it again"):
        train.main(arguments)
    first(folder).unlink()
    train.main(arguments)
    assert first(folder).read_bytes() == first(filled / "cache").read_bytes()
    same(filled / "out_cache", tmp_path / "out")


def test_a_complete_cache_is_only_read(world, filled, tmp_path, monkeypatch):
    """So it may lie on a read-only disk, and several runs may use it at once."""
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 8)
    monkeypatch.setattr(teacher_cache, "claim", None)
    train.main(flags(world, "d2d", tmp_path / "out", max_steps=4, teacher_cache=filled / "cache"))
    same(filled / "out_cache", tmp_path / "out")


def test_a_teacher_of_nan_fills_no_cache(world, tmp_path):
    teacher = Llava.from_pretrained(world / "teacher")
    with torch.no_grad():
        teacher.adaptor.linear_1.weight.mul_(1e30)                   # finite; what is computed from them is not
        teacher.adaptor.linear_2.weight.mul_(1e30)
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="the teacher's outputs are NaN for .*rows.json row .*; check its weights"):
        train.main(flags(world, "d2d", tmp_path / "out", max_steps=1, teacher_cache=tmp_path / "cache",
                         teacher=tmp_path / "teacher"))
    assert not list((tmp_path / "cache").glob("rows-*"))
    release(tmp_path / "cache")
    claim(tmp_path / "cache", teacher_cache.OWNER)                   # still its own: the next run fills it
    assert resume.OWNER != teacher_cache.OWNER
