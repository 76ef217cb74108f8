"""
Damaged records of our own programs and odd answers of others: a teacher cache, answers and results of an evaluation, a
benchmark's files, a Hub's listing. Reading them gives what was written, or one line that names the file or the address.

    python -m pytest tests/robustness/test_fuzz_records.py
"""
import json

import pytest
import torch
from hypothesis import given

import evaluate
import train
from configurator import UserError
from engine import teacher_cache
from engine.teacher_cache import TeacherCache
from test_download import hub                                        # noqa: F401 (a fixture)
from test_evaluate import gqa, put
from test_fuzz_files import edited_json, fuzz, mutated, one_line, with_file
from test_train import flags
from tools import download


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    """A filled cache of 32 rows in 4 files."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "ROWS_PER_FILE", 8)
        train.main(flags(world, "d2d", folder / "out", max_steps=4, teacher_cache=folder / "cache", teacher_top_k=5))
    return folder / "cache"


@pytest.mark.parametrize("name", ["teacher_cache.json", "rows-000000008.safetensors"])
def test_caches(cache, tmp_path, monkeypatch, name):
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 8)
    monkeypatch.setattr(teacher_cache, "PATIENCE", 0)
    key = json.loads((cache / "teacher_cache.json").read_text())
    key.pop("version")
    original = TeacherCache(cache, 32, key)
    rows = [original[row] for row in range(32)]

    @fuzz
    @given(mutated(cache / name))
    def check(content):
        folder = with_file(cache, tmp_path / "copy", name, content)
        try:
            copy = TeacherCache(folder, 32, key)
            copy.check(0, 1)
            found = [copy[row] for row in range(32)]
        except UserError as error:
            one_line(error, folder)
            return
        for ours, theirs in zip(found, rows, strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours)
    check()


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """GQA's files, an answer file, and the folder that scoring it leaves."""
    root = tmp_path_factory.mktemp("scored")
    answers, _ = gqa(root)
    put(root / "answers.jsonl", [row for _, row in answers])
    evaluate.main(command(root, root / "answers.jsonl", root / "out"))
    return root


def command(root, answers, out_dir):
    return ["--benchmark=gqa", f"--data={root}", f"--answers={answers}", f"--out_dir={out_dir}"]


FILES = ["answers.jsonl", "out/results.json", "gqa/llava_gqa_testdev_balanced.jsonl",
         "gqa/data/testdev_balanced_questions.json"]


@pytest.mark.parametrize("name", FILES)
def test_evaluations(scored, tmp_path, name):
    @fuzz
    @given(mutated(scored / name))
    def check(content):
        folder = with_file(scored, tmp_path / "copy", name, content)
        try:
            evaluate.main(command(folder, folder / "answers.jsonl", folder / "out"))
        except UserError as error:
            one_line(error, folder, "gqa")
            return
        [result] = [entry for key, entry in json.loads((folder / "out/results.json").read_text()).items() if key == "gqa"]
        assert 0 <= result["accuracy"] <= 100 and result["missing"] == 0
    check()


def test_partial_answers(tmp_path):
    """Whatever a killed run has left: texts by job, and lines that were not touched are kept."""
    lines = [json.dumps({"job": f"{i:064x}", "text": f"answer {i}"}) + "\n" for i in range(5)]
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(lines))

    @fuzz
    @given(mutated(whole))
    def check(content):
        path = tmp_path / "answers.partial.jsonl"
        path.write_bytes(content)
        found = evaluate.read_partial_answers(path)
        assert all(isinstance(job, str) and isinstance(text, str) for job, text in found.items())
        for i, line in enumerate(lines):
            if content.count(line.encode()) == content.count(b"%064x" % i) == 1 and content.count(b"\n" + line.encode()):
                assert found[f"{i:064x}"] == f"answer {i}"
    check()


def test_listings(hub, tmp_path):                                    # noqa: F811
    repository = download.Repository("me/model", hub.endpoint)
    hub.raw_listing = None
    whole = tmp_path / "listing.json"
    whole.write_text(json.dumps(hub.entries()))

    @fuzz
    @given(mutated(whole) | edited_json(whole.read_text()))
    def check(content):
        hub.raw_listing = content
        try:
            files = repository.files()
            paths = [download.local_path(tmp_path, file.name) for file in files]
        except UserError as error:
            one_line(error, hub.endpoint, "the listing")
            return
        assert all(tmp_path in path.parents for path in paths) and all(file.size >= 0 for file in files)
    check()
