"""
Training from the teacher's stored outputs against training with the teacher itself.

    python -m pytest tests/test_teacher_cache.py
"""
import json

import pytest
import torch
from safetensors.torch import load_file

import train
from configurator import UserError
from engine import teacher_cache
from engine.files import digest_of_folder
from engine.teacher_cache import TeacherCache, top_k
from model import Llava
from test_train import flags, records, run


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
    train.main(flags(world, "d2d", tmp_path / "a", max_steps=1, teacher_cache=tmp_path / "tokens", teacher_top_k=5))
    file = load_file(tmp_path / "tokens" / "rows-000000000.safetensors")
    n_tokens = int(file["row_offsets"][-1])
    size = sum(t.numel() * t.itemsize for name, t in file.items() if name != "row_offsets")
    assert size == n_tokens * (8 * 5 + 4) and len(file["row_offsets"]) == 32 + 1
    train.main(flags(world, "pd", tmp_path / "b", max_steps=1, teacher_cache=tmp_path / "pairs"))
    assert load_file(tmp_path / "pairs" / "rows-000000000.safetensors")["teacher_logprobs"].shape == (32, 2)


def test_an_interrupted_filling_is_completed_and_two_ranks_share_it(world, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 10)
    train.main(flags(world, "d2s", tmp_path / "a", max_steps=1, teacher_cache=tmp_path / "cache"))
    files = sorted((tmp_path / "cache").glob("rows-*.safetensors"))
    assert [path.name for path in files] == [f"rows-{start:09d}.safetensors" for start in (0, 10, 20, 30)]
    before = {path: path.read_bytes() for path in files}
    files[1].unlink()
    asked = []
    original = train.teacher_targets
    monkeypatch.setattr(train, "teacher_targets", lambda teacher, batch, **rest: asked.append(len(batch["mask"])) or
                        original(teacher, batch, **rest))
    train.main(flags(world, "d2s", tmp_path / "b", max_steps=1, teacher_cache=tmp_path / "cache"))
    assert sum(asked) == 10 and {path: path.read_bytes() for path in files} == before
    monkeypatch.undo()
    shared = dict(max_steps=1, micro_batch_size=4, teacher_cache=tmp_path / "shared")
    done = run(flags(world, "d2s", tmp_path / "c", **shared), nproc=2)
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "c")[0]["kd"] == pytest.approx(records(tmp_path / "a")[0]["kd"], abs=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(teacher_top_k=5), "top_k=64, this run has top_k=5"),
    (dict(kd_tokens="all"), "kd_tokens='response', this run has kd_tokens='all'"),
    (dict(max_length=40), "was made with data="),
    (dict(teacher="other"), "was made with teacher="),
])
def test_a_cache_of_other_data_or_of_another_teacher_is_refused(world, tmp_path, change, message):
    train.main(flags(world, "d2d", tmp_path / "a", max_steps=1, teacher_cache=tmp_path / "cache"))
    if "teacher" in change:
        teacher = Llava.from_pretrained(world / "teacher")
        with torch.no_grad():
            teacher.adaptor.linear_1.weight.mul_(1.01)
        teacher.save_pretrained(tmp_path / "other")
        change = dict(teacher=tmp_path / "other")
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
    assert [rows for _, rows in cache.missing()] == [range(0, 1024), range(1024, 2048), range(2048, 2500)]
