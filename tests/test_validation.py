"""
Held-out rows and what a run says: they are never trained on and change nothing, their loss is what the exported model gives
row by row, the same on any number of ranks and after a resume; lines are means; warnings come when something is wrong.

    python -m pytest tests/test_validation.py
"""
import json
import re

import numpy as np
import pytest
import torch

import train
from configurator import UserError
from data import Sampler, collate
from engine import log
from engine.index import InstructionData, RowData
from losses import forward_kl
from model import Llava
from test_distributed import on_ranks, unfinish
from test_train import flags, records, weights

HELD_OUT = dict(val_rows=6, val_every=2, max_steps=5, batch_size=4, micro_batch_size=4)


def rows_of(world, model):
    return InstructionData([(str(world / "rows.json"), 1.0)], str(world / "images"), model.tokenizer, "vicuna", 4, 28, 2048)


def test_held_out_rows_are_in_no_batch(world):
    dataset = rows_of(world, Llava.from_pretrained(world / "dense"))
    held_out = dataset.held_out(6)
    assert len(set(held_out.tolist())) == 6 and held_out.tolist() == dataset.held_out(6).tolist()
    assert set(dataset.held_out(3).tolist()) < set(held_out.tolist())          # more rows: the same, and others
    weighted = [(0, 20, 2.5), (20, 32, 1.0)]
    sampler = Sampler(dataset.lengths, 4, 0, weighted, held_out)
    drawn = [row for step in range(3 * sampler.steps_per_epoch) for row in sampler.batch(step)]
    assert set(drawn) == set(range(32)) - set(held_out.tolist())
    with pytest.raises(UserError, match="val_rows=32, but there are only 32 rows in all"):
        dataset.held_out(32)


def test_training_reads_all_rows_but_those(world, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(RowData, "__getitem__", lambda self, i, original=RowData.__getitem__: reads.append(i) or original(self, i))
    train.main(flags(world, "sft", tmp_path, **HELD_OUT | dict(max_steps=0, epochs=3)))
    held_out = reads[:6]                                               # they are read once, before the first step
    assert len(set(held_out)) == 6 and set(reads[6:]) == set(range(32)) - set(held_out)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """d2s on one rank, on two with ddp and fsdp, without validation on the way, killed after step 2; and in pd."""
    out = tmp_path_factory.mktemp("validation")
    more = HELD_OUT | dict(save_every=2)
    train.main(flags(world, "d2s", out / "one", **more))
    train.main(flags(world, "d2s", out / "seldom", **more | dict(val_every=0)))
    unfinish(out / "one", out / "resumed", 2)
    train.main(flags(world, "d2s", out / "resumed", **more))
    train.main(flags(world, "pd", out / "pd", **more))
    on_ranks(2, world, [dict(stage="d2s", out_dir=out / layout, **more | dict(micro_batch_size=2, parallel=layout))
                        for layout in ("ddp", "fsdp")])
    return out


def test_the_held_out_loss_is_what_the_exported_model_gives(world, runs):
    """Cross-entropy and KL of each row by itself, added up over the response tokens of all rows."""
    student, teacher = Llava.from_pretrained(runs / "one").eval(), Llava.from_pretrained(world / "teacher").eval()
    dataset, ce, kd, tokens = rows_of(world, student), 0.0, 0.0, 0
    for row in dataset.held_out(6).tolist():
        batch = collate([dataset[row]], student.config.pad_token_id)
        with torch.no_grad():
            ours, theirs = (model(batch["input_ids"], batch["pixel_values"])[0, :-1] for model in (student, teacher))
        answer = batch["mask"][0, 1:]
        ce -= ours.log_softmax(-1)[answer].gather(1, batch["input_ids"][0, 1:][answer][:, None]).sum().item()
        kd += forward_kl(ours[answer], theirs[answer]).sum().item()
        tokens += int(answer.sum())
    last = records(runs / "one")[-1]
    assert last["val_ce"] == pytest.approx(ce / tokens, abs=1e-4) and last["val_kd"] == pytest.approx(kd / tokens, abs=1e-4)
    assert last["val_loss"] == pytest.approx(last["val_ce"] + last["val_kd"] + 0.01 * last["val_balance"], abs=1e-5)
    assert ["val_loss" in record for record in records(runs / "one")] == [False, True, False, True, True]
    assert {name for name in records(runs / "pd")[-1] if name.startswith("val_")} == {
        "val_loss", "val_preference", "val_margin", "val_accuracy", "val_chosen", "val_rejected", "val_balance"}


def test_validation_changes_no_weight(runs):
    a, b = weights(runs / "one"), weights(runs / "seldom")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert ["val_loss" in record for record in records(runs / "seldom")] == [False] * 4 + [True]


@pytest.mark.parametrize("other", ["resumed", "ddp", "fsdp"])
def test_the_same_on_two_ranks_and_after_a_resume(runs, other):
    tolerance = 0.0 if other == "resumed" else 1e-5                    # two ranks: sums in another order
    for a, b in zip(records(runs / "one"), records(runs / other), strict=True):
        for name in ("loss", "val_loss", "val_ce", "val_kd", "val_balance"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), abs=tolerance, rel=0)


def test_a_teacher_cache_serves_them_too(world, runs, tmp_path):
    """All 64 words kept per token: the cached distribution is whole. Another val_rows adds the rows that it visits besides."""
    for rows in (6, 8):
        train.main(flags(world, "d2s", tmp_path / str(rows), **HELD_OUT | dict(val_rows=rows), teacher_cache=tmp_path / "cache"))
    assert records(tmp_path / "6")[-1]["val_loss"] == pytest.approx(records(runs / "one")[-1]["val_loss"], abs=1e-4)


def test_rows_that_cannot_be_divided_among_the_ranks(world):
    dist, config = train.Dist(0, 0, 4, torch.device("cpu"), None), train.Config(micro_batch_size=2, num_workers=0)
    with pytest.raises(UserError, match="val_rows=6 cannot be divided among 4 ranks; try val_rows=8"):
        train.held_out_batches([], np.arange(9), np.arange(6), None, config, dist)


def test_every_rank_has_as_many_batches():
    """7 x 4 rows in micro-batches of at most 3: 3 on each of 4 ranks, every row once, sorted by length."""
    lengths = np.random.default_rng(0).integers(5, 50, 40)
    rows, config = [{"input_ids": [i], "mask": [1], "images": []} for i in range(40)], train.Config(micro_batch_size=3, num_workers=0)
    groups = [train.held_out_batches(rows, lengths, np.arange(3, 31), lambda samples: [s["input_ids"][0] for s in samples], config,
                                     train.Dist(rank, rank, 4, torch.device("cpu"), None)) for rank in range(4)]
    assert [len(batches) for batches in groups] == [3] * 4 and max(len(batch) for batches in groups for batch in batches) == 3
    assert sorted(row for batches in groups for batch in batches for row in batch) == list(range(3, 31))


# -----------------------------------------------------------------------------
# What the screen shows

def record(step, loss, **more):
    return {"step": step, "loss": loss, "ce": 2 * loss, **more, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "seconds": 0.5}


def test_a_line_shows_the_means_since_the_last():
    line = log.line([record(1, 1.0, kd=3.0), record(2, 2.0), record(3, 6.0, kd=4.0)], 10, 60.0)
    assert line == "step 3/10  loss 3.0000  ce 6.0000  kd 3.5000  lr 1.00e-03  grad 1.000  200 tok/s  7.0 min left"


def test_the_lines_of_a_run(world, tmp_path, capsys):
    train.main(flags(world, "sft", tmp_path, **HELD_OUT | dict(max_steps=6, log_every=3)))
    said, losses = capsys.readouterr().out, [each["loss"] for each in records(tmp_path)]
    means = [float(text) for text in re.findall(r"step [36]/6  loss ([\d.]+)", said)]
    assert means == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])], abs=1e-4)
    assert len(re.findall(r"step [246]/6 on held-out rows:  loss [\d.]+  ce [\d.]+\n", said)) == 3
    assert "26 rows, 4 a step" in said and "6 rows are held out" in said


def warned(losses, counts=None, first=()):
    """The warnings of a run with these losses, by step."""
    warnings, said = log.Warnings(list(first), [0, 2]), {}
    for step, loss in enumerate(losses, start=1):
        parts = {} if counts is None else {"counts": torch.tensor(counts(step))}
        for line in warnings.after(record(step, loss), parts):
            said.setdefault(step, []).append(line)
    return said


def test_a_loss_above_its_start_is_said_once():
    noise = np.random.default_rng(0).normal(0, 0.1, 400)
    assert warned(1 + noise) == {}                                     # neither falls nor rises
    assert warned(np.linspace(9, 1, 400) + noise) == {}
    risen = warned(np.concatenate([1 + noise[:100], 2 + noise[:100], 1 + noise[:100], 3 + noise[:40]]))
    assert list(risen) == [120, 320]                                   # and once more when it comes back
    assert risen[120][0].startswith("warning: steps 101 to 120: the mean loss is 1.98") and "first 20 steps" in risen[120][0]
    assert list(warned(2 + noise[:40], first=1 + noise[:20])) == [20]  # resumed: the start is the run's, not the process's


def test_an_expert_without_tokens_is_named():
    """Counts are (layers, 2, experts); the sparse layers here are 0 and 2. Expert 1 of layer 2 gets 0.5 % from step 41 to 80."""
    def counts(step):
        few = 1 if 40 < step <= 80 else 100
        return [[[50, 50, 50], [50, 50, 50]], [[99, few, 0], [0, 0, 100]]]
    said = warned([1.0] * 120, counts)
    assert list(said) == [60]
    assert said[60] == ["warning: steps 41 to 60: less than 1% of the tokens go to layer 2 expert 1; a larger balance_coef spreads them"]
