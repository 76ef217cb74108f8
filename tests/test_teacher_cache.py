"""
Training from the teacher's stored outputs against training with the teacher itself.

    python -m pytest tests/test_teacher_cache.py
"""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from configurator import UserError
from data import Sampler
from engine import teacher_cache
from engine.files import digest_of_folder
from engine.teacher_cache import TeacherCache, top_k
from model import Llava
from processes import run
from test_train import flags, records


def test_top_k_and_the_mass_of_the_rest():
    logits = torch.randn(3, 7)
    ids, logprobs, tail = top_k(logits, 4)
    p = logits.double().softmax(-1)
    for n in range(3):
        order = sorted(range(7), key=lambda v: -p[n, v])
        assert ids[n].tolist() == order[:4]
        torch.testing.assert_close(logprobs[n].double(), p[n, order[:4]].log(), atol=1e-6, rtol=0)
        assert tail[n].exp().item() == pytest.approx(sum(p[n, v].item() for v in order[4:]), abs=1e-6)
    assert top_k(logits, 7)[2].tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("stage, more", [("d2d", {}), ("d2s", {}), ("d2s", dict(kd_tokens="all")), ("pd", {})],
                         ids=["d2d", "d2s", "prompt_too", "pd"])
def test_with_all_of_the_vocabulary_training_is_the_same_as_with_the_teacher(world, tmp_path, stage, more):
    """k = V: the same loss curve, 1e-5; and the second run does not open the teacher."""
    train.main(flags(world, stage, tmp_path / "online", **more))
    cached = dict(teacher_cache=tmp_path / "cache", **more)
    if stage != "pd":
        cached["teacher_top_k"] = 1000                               # more than there are: all
    train.main(flags(world, stage, tmp_path / "first", **cached))
    train.main(flags(world, stage, tmp_path / "second", **cached, micro_batch_size=2, teacher=tmp_path / "not_here"))
    online, first, second = (records(tmp_path / name) for name in ("online", "first", "second"))
    for a, *others in zip(online, first, second, strict=True):
        for b in others:
            for key in a.keys() - {"tokens_per_s", "seconds"}:
                torch.testing.assert_close(torch.tensor(b[key]), torch.tensor(a[key]), rtol=1e-5, atol=1e-5)


def test_fewer_logprobs_give_a_lower_bound_that_grows_with_k(world, tmp_path):
    train.main(flags(world, "d2d", tmp_path / "online", max_steps=1))
    losses = []
    for k in (1, 4, 16, 63):
        cached = dict(teacher_cache=tmp_path / f"cache{k}", teacher_top_k=k)
        train.main(flags(world, "d2d", tmp_path / str(k), max_steps=1, **cached))
        losses.append(records(tmp_path / str(k))[0]["kd"])
    assert losses == sorted(losses) and losses[-1] == pytest.approx(records(tmp_path / "online")[0]["kd"], abs=1e-5)


def test_what_lies_on_disk(world, tmp_path):
    """8 k + 4 bytes per response token; in pd, two numbers per pair."""
    train.main(flags(world, "d2d", tmp_path / "a", max_steps=4, teacher_cache=tmp_path / "tokens", teacher_top_k=5))
    file = load_file(tmp_path / "tokens" / "rows-000000000.safetensors")
    n_tokens = int(file["row_offsets"][-1])
    size = sum(t.numel() * t.itemsize for name, t in file.items() if name != "row_offsets")
    assert size == n_tokens * (8 * 5 + 4) and len(file["row_offsets"]) == 32 + 1
    train.main(flags(world, "pd", tmp_path / "b", max_steps=4, teacher_cache=tmp_path / "pairs"))
    assert load_file(tmp_path / "pairs" / "rows-000000000.safetensors")["teacher_logprobs"].shape == (32, 2)


def test_an_interrupted_filling_is_completed_and_two_ranks_share_it(world, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 10)
    train.main(flags(world, "d2s", tmp_path / "a", max_steps=4, teacher_cache=tmp_path / "cache"))
    files = sorted((tmp_path / "cache").glob("rows-*.safetensors"))
    assert [path.name for path in files] == [f"rows-{start:09d}.safetensors" for start in (0, 10, 20, 30)]
    before = {path: path.read_bytes() for path in files}
    files[1].unlink()
    asked = []
    original = train.teacher_targets
    monkeypatch.setattr(train, "teacher_targets", lambda teacher, batch, **rest: asked.append(len(batch["mask"])) or
                        original(teacher, batch, **rest))
    train.main(flags(world, "d2s", tmp_path / "b", max_steps=4, teacher_cache=tmp_path / "cache"))
    assert sum(asked) == 10 and {path: path.read_bytes() for path in files} == before
    monkeypatch.undo()
    shared = dict(max_steps=4, micro_batch_size=4, teacher_cache=tmp_path / "shared")
    done = run(flags(world, "d2s", tmp_path / "c", **shared), nproc=2)
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "c")[0]["kd"] == pytest.approx(records(tmp_path / "a")[0]["kd"], abs=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(teacher_top_k=5), "top_k=64, this run has top_k=5"),
    (dict(kd_tokens="all"), "kd_tokens='response', this run has kd_tokens='all'"),
    (dict(max_length=40), "was made with data="),
    (dict(teacher="other"), "was made with teacher="),
    (dict(image_dir="other"), "was made with data="),
])
def test_a_cache_of_other_data_or_of_another_teacher_is_refused(world, tmp_path, change, message):
    train.main(flags(world, "d2d", tmp_path / "a", max_steps=1, teacher_cache=tmp_path / "cache"))
    if "teacher" in change:
        teacher = Llava.from_pretrained(world / "teacher")
        with torch.no_grad():
            teacher.adaptor.linear_1.weight.mul_(1.01)
        teacher.save_pretrained(tmp_path / "other")
        change = dict(teacher=tmp_path / "other")
    if "image_dir" in change:                                        # other pictures of the same names
        shutil.copytree(world / "images", tmp_path / "other")
        shutil.copy(world / "images" / "1.png", tmp_path / "other" / "0.png")
        change = dict(image_dir=tmp_path / "other")
    with pytest.raises(UserError) as caught:
        train.main(flags(world, "d2d", tmp_path / "b", max_steps=1, teacher_cache=tmp_path / "cache", **change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_cache_in_another_format_is_refused(tmp_path):
    """Caches written before the format had a version name the rows' offsets differently."""
    record = tmp_path / "teacher_cache.json"
    record.write_text(json.dumps({"data": "x", "teacher": "y"}))
    with pytest.raises(UserError) as caught:
        TeacherCache(tmp_path, 10, {"data": "x", "teacher": None})
    assert str(caught.value) == (f"{record}: has format version 1, this program reads version 3; choose another "
                                 "teacher_cache folder, or delete this one to fill it again")


def test_a_damaged_file_and_a_missing_teacher(world, tmp_path):
    train.main(flags(world, "d2d", tmp_path / "a", max_steps=1, teacher_cache=tmp_path / "cache"))
    file = tmp_path / "cache" / "rows-000000000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="rows-000000000.safetensors: cannot be read .* delete it"):
        train.main(flags(world, "d2d", tmp_path / "b", max_steps=1, teacher_cache=tmp_path / "cache"))
    with pytest.raises(UserError, match="the teacher that could fill it is not here"):
        missing = dict(teacher_cache=tmp_path / "new", teacher=tmp_path / "no")
        train.main(flags(world, "d2d", tmp_path / "c", max_steps=1, **missing))


def test_digest_tells_two_teachers_apart(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    first = digest_of_folder(tmp_path)
    assert first == digest_of_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert first != digest_of_folder(tmp_path)


def test_each_file_holds_1024_rows(tmp_path):
    cache = TeacherCache(tmp_path, 2500, {"data": "x"})
    assert [rows for _, rows in cache.missing()] == [[*range(0, 1024)], [*range(1024, 2048)], [*range(2048, 2500)]]


def filled(folder):
    """The rows that the cache holds."""
    rows = []
    for path in sorted(folder.glob("rows-*.safetensors")):
        lengths = load_file(path)["row_offsets"].diff().tolist()
        rows += [int(path.stem[5:]) + i for i, length in enumerate(lengths) if length]
    return rows


def test_only_rows_that_the_run_visits_are_filled_and_a_longer_run_adds_its_own(world, tmp_path, monkeypatch, capsys):
    """32 rows in files of 10; 8 rows a step. The longer run does not ask about what is there, and gives the teacher's losses."""
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 10)
    asked, original = [], train.teacher_targets
    monkeypatch.setattr(train, "teacher_targets", lambda teacher, batch, **rest: asked.append(len(batch["mask"])) or
                        original(teacher, batch, **rest))
    shared = dict(teacher_cache=tmp_path / "cache", teacher_top_k=1000)
    train.main(flags(world, "d2s", tmp_path / "one", max_steps=1, **shared))
    said = capsys.readouterr().out
    assert "teacher cache: 8 rows to fill, " in said and "hours on 1 ranks" in said and "outputs take about" in said
    first, n = filled(tmp_path / "cache"), sum(asked)
    assert len(first) == 8 == n
    train.main(flags(world, "d2s", tmp_path / "three", max_steps=3, **shared))
    assert set(first) < set(filled(tmp_path / "cache")) and len(filled(tmp_path / "cache")) == 24 == sum(asked)
    train.main(flags(world, "d2s", tmp_path / "online", max_steps=3))
    for a, b in zip(records(tmp_path / "three"), records(tmp_path / "online"), strict=True):
        assert a["kd"] == pytest.approx(b["kd"], rel=1e-5)
    with pytest.raises(UserError, match="has no row .*, which this run visits; the teacher that could fill it is not here"):
        train.main(flags(world, "d2s", tmp_path / "four", max_steps=4, **shared, teacher=tmp_path / "gone"))
    train.main(flags(world, "d2s", tmp_path / "again", max_steps=2, **shared, teacher=tmp_path / "gone"))
    assert sum(asked) == 24


def test_the_rows_of_the_first_steps():
    sampler = Sampler(torch.randint(1, 99, (50,)).numpy(), 8, seed=3)
    for steps in (1, 5, 6, 7, 14):
        assert sampler.visited(steps).tolist() == sorted({row for step in range(steps) for row in sampler.batch(step)})


def test_too_little_disk_is_noticed_after_the_first_batch(world, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="outputs take about .* and 1 kB are free there; make room"):
        train.main(flags(world, "d2s", tmp_path / "out", max_steps=1, teacher_cache=tmp_path / "cache"))
    assert not filled(tmp_path / "cache")


def test_a_file_that_a_network_disk_shows_late_is_waited_for(tmp_path, monkeypatch):
    cache = TeacherCache(tmp_path, 3, {"data": "x"})
    path, span = cache.file_from(0)
    waits = []

    def appear(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            tensors = {"logprob": torch.ones(3, 2), "row_offsets": torch.tensor([0, 1, 2, 3])}
            save_file(tensors, path, metadata={"checksum": cache.checksum(0, tensors)})
    monkeypatch.setattr(teacher_cache.time, "sleep", appear)
    cache.check(0, 1)
    assert len(waits) == 2
    path.unlink()
    monkeypatch.setattr(teacher_cache, "PATIENCE", -1)
    with pytest.raises(UserError, match="cannot be seen from this machine"):
        cache.check(0, 1)
