"""
Data under bad conditions: damaged indexes, files that change, two builders at once, workers that die.
Run: python -m pytest tests/robustness/test_data_faults.py
"""
import functools
import itertools
import multiprocessing
import os
import re
import signal
import time
import types
from pathlib import Path

import pytest
import torch

from configurator import UserError
from data import Sampler, batches, collate, render
from engine import index as index_file
from engine.files import atomic
from engine.index import InstructionData
from test_data import numbered_samples
from test_index import MIXED, count_calls, dataset, make_world, numbered_rows, row


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "text", "number", "time", "fact"])
def test_a_damaged_index_is_built_again(world, monkeypatch, capsys, damage):
    file = world(MIXED[1:3])
    first = dataset(InstructionData, world, file)
    [index] = world.folder.glob("*.index")
    whole, calls = index.read_bytes(), count_calls(monkeypatch)
    broken = {"cut": whole[:-1], "empty": b"", "header": b"\xff" * 8 + whole[8:], "text": b"hello" * 99,
              "number": whole[:-1] + bytes([whole[-1] ^ 1]), "time": whole.replace(b'"mtime_ns": 1', b'"mtime_ns": 2'),
              "fact": whole.replace(b'"sha256": "', b'"sha257": "')}[damage]
    assert broken != whole
    index.write_bytes(broken)
    assert (dataset(InstructionData, world, file).lengths == first.lengths).all() and len(calls) == 2
    assert re.fullmatch(rf"{index}: damaged \(.+\); building it again\n", capsys.readouterr().err)
    assert dataset(InstructionData, world, file).fingerprint == first.fingerprint and len(calls) == 2


def test_a_file_that_changes_during_indexing_is_not_indexed(world, monkeypatch):
    file, calls = world(MIXED[1:3]), itertools.count(1)
    touch = lambda *args, **more: os.utime(file, (0, next(calls))) or render(*args, **more)
    monkeypatch.setattr(index_file, "render", touch)
    with pytest.raises(UserError, match="changed while it was being indexed; start again when it is complete"):
        dataset(InstructionData, world, file)
    assert not list(world.folder.glob("rows.json.*"))


def test_a_folder_that_takes_no_index(world):
    file = world([row(0, "Hi", "Ho")], "x" * 245 + ".json")  # with more behind it the name is too long for a file
    message = rf"^{file}.*index: cannot be written \(File name too long\);.*; make the folder writable"
    with pytest.raises(UserError, match=message):
        dataset(InstructionData, world, file)


def test_unique_temporary_names_do_not_meet(tmp_path):
    with atomic(tmp_path / "x", unique=True) as first, atomic(tmp_path / "x", unique=True) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "first"


def build_in_another_process(folder, go):
    go.wait()
    world = types.SimpleNamespace(folder=Path(folder))
    dataset(InstructionData, world, f"{folder}/rows.json")[0]


def test_two_processes_build_the_same_index(world):
    file, context = world(MIXED[1:3] * 100), multiprocessing.get_context("fork")
    go = context.Event()
    processes = [context.Process(target=build_in_another_process, args=(str(world.folder), go)) for _ in range(2)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0] and len(list(world.folder.glob("rows.json.*"))) == 1
    assert len(dataset(InstructionData, world, file)) == 100


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_later_is_one_line_from_a_worker_too(world, num_workers):
    data = numbered_rows(world)
    (world.folder / "a.png").write_bytes(b"\x89PNG and then nothing")
    sampler = Sampler(data.lengths, 4, seed=0)
    with pytest.raises(UserError) as caught:
        for _ in batches(data, sampler, 2, 0, 1, 0, 3, num_workers, functools.partial(collate, pad_token_id=0)):
            pass
    line = str(caught.value)
    assert re.match(rf"{world.folder}/rows.json row \d+: {world.folder}/a.png: not a readable image", line)
    assert "\n" not in line


def kill_this_process(samples):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line_and_no_hang():
    data, lengths = numbered_samples()
    with pytest.raises(UserError, match=r"^a process that reads the data died \(DataLoader worker .*num_workers$"):
        list(batches(data, Sampler(lengths, 4), 2, 0, 1, 0, 3, 1, kill_this_process))


def signal_this_process(samples):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return {"input_ids": torch.tensor([len(samples)])}


def test_a_worker_survives_the_signals_that_are_meant_for_the_run():
    (data, lengths), start = numbered_samples(), time.time()
    assert len(list(batches(data, Sampler(lengths, 4), 2, 0, 1, 0, 3, 1, signal_this_process))) == 3
    assert time.time() - start < 20  # and the end of the run does not wait for its alarm
