"""
engine/distributed.py: several ranks compute what one does in every layout, a state written by any number of ranks in
any layout can be resumed in any other, and everything the objective trains is optimized, clipped, saved and restored.

    python -m pytest tests/test_distributed.py
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from safetensors.torch import load_file
from torch import nn

import train
from configurator import UserError
from engine import distributed
from processes import ended, start
from model import Llava
from test_train import STAGES, flags, records


def on_ranks(nproc: int, world: Path, runs: list[dict]) -> None:
    """The runs one after another on `nproc` ranks; out_dir/digests holds a digest of each rank's final weights."""
    def work(rank: int) -> None:
        seen, parallelize = {}, distributed.parallelize

        def recorded(objective, dist, *rest, **more):
            seen["student"], seen["dist"] = objective.student, dist
            return parallelize(objective, dist, *rest, **more)

        distributed.parallelize = recorded
        for settings in runs:
            train.main(flags(world, **settings))
            digest = hashlib.sha256()
            for name, parameter in sorted(seen["student"].named_parameters()):
                digest.update(distributed.full(parameter.detach()).float().numpy().tobytes())
            digests = seen["dist"].all_gather(digest.hexdigest())
            if rank == 0:
                (Path(settings["out_dir"]) / "digests").write_text(json.dumps(digests))
        torch_dist.destroy_process_group()

    codes, errors = ended(start(nproc, work), 300)
    assert codes == [0] * nproc, errors


def differences(a: Path, b: Path) -> tuple[float, float]:
    """The largest difference between the loss curves, and between the exported weights."""
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    weights = max((first[key].float() - second[key].float()).abs().max().item() for key in first if first[key].numel())
    curves = max(abs(x[key] - y[key]) for x, y in zip(records(a), records(b), strict=True)
                 for key in ("loss", "grad_norm"))
    return curves, weights


def unfinish(source: Path, target: Path, step: int) -> None:
    """A copy of a finished run, as if it had been killed after it saved `step`."""
    shutil.copytree(source, target)
    for path in (target / "state").glob("*.pt"):
        if path.name > f"step_{step:08d}.pt":
            path.unlink()
    run = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(run | {"finished": False}))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """Every stage on 1 rank, and on 2 with ddp and with fsdp, 3 micro-batches accumulated; gradients are clipped."""
    out = tmp_path_factory.mktemp("distributed")
    common = dict(batch_size=12, max_steps=4, save_every=2, grad_clip=0.5)
    for stage in STAGES:
        one = common | dict(micro_batch_size=12)
        train.main(flags(world, stage, out / f"{stage}-one", **one))
        train.main(flags(world, stage, out / f"{stage}-checkpointing", **one, checkpointing=True))
    runs = [dict(stage=stage, out_dir=out / f"{stage}-{layout}", **common | dict(micro_batch_size=2, parallel=layout))
            for stage in STAGES for layout in ("ddp", "fsdp")]
    runs += [dict(stage="d2s", out_dir=out / f"d2s-{layout}-checkpointing",
                  **common | dict(micro_batch_size=2, parallel=layout, checkpointing=True))
             for layout in ("ddp", "fsdp")]
    on_ranks(2, world, runs)
    return out


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_compute_what_one_does(done, stage, layout):
    """With ddp, Adam is sharded. Sums in another order: 1e-5. The weights moved by 1e-2; Adam enlarges the rounding of
    gradients that are nearly 0, on some CPUs to 1.1e-5."""
    curves, weights = differences(done / f"{stage}-one", done / f"{stage}-{layout}")
    assert curves < 1e-5 and weights < 5e-5
    digests = json.loads((done / f"{stage}-{layout}" / "digests").read_text())
    assert len(digests) == 2 and len(set(digests)) == 1              # both ranks hold the same bits


@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_changes_nothing(done, stage):
    assert differences(done / f"{stage}-one", done / f"{stage}-checkpointing") == (0.0, 0.0)
    if stage == "d2s":
        for layout in ("ddp", "fsdp"):
            assert differences(done / f"{stage}-{layout}", done / f"{stage}-{layout}-checkpointing") == (0.0, 0.0)


def test_the_folder_and_the_state_do_not_depend_on_the_layout(done):
    """The same files, the same tensors under the same names, in the same dtypes and shapes."""
    def shapes(tensors):
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    one = done / "d2s-one"
    state = torch.load(one / "state" / "step_00000004.pt", weights_only=True)
    for layout in ("ddp", "fsdp"):
        other = done / f"d2s-{layout}"
        files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "digests"}
                 for folder in (one, other)]
        assert files[0] == files[1]
        assert shapes(load_file(one / "model.safetensors")) == shapes(load_file(other / "model.safetensors"))
        theirs = torch.load(other / "state" / "step_00000004.pt", weights_only=True)
        assert shapes(state["weights"]) == shapes(theirs["weights"])
        assert {name: shapes(adam) for name, adam in state["adam"].items()} == \
               {name: shapes(adam) for name, adam in theirs["adam"].items()}


# The layout that saved at step 2 (1 rank, or 2 with ddp or fsdp), and the one that resumes (1 rank, or 4). align trains
# four tensors only, so that with ddp on 4 ranks some of the sharded optimizers are nearly empty.
CHANGES = [("d2s", before, after) for before in ("one", "ddp", "fsdp") for after in ("one", "ddp", "fsdp")]
CHANGES += [("align", "ddp", "ddp")]


@pytest.fixture(scope="module")
def resumed(done, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("resumed")
    settings, four = dict(batch_size=12, max_steps=4, save_every=2, grad_clip=0.5), []
    for stage, before, after in CHANGES:
        folder = out / f"{stage}-{before}-{after}"
        unfinish(done / f"{stage}-{before}", folder, step=2)
        if after == "one":
            train.main(flags(world, stage, folder, **settings | dict(micro_batch_size=4)))
        else:
            four.append(dict(stage=stage, out_dir=folder, **settings | dict(micro_batch_size=3, parallel=after)))
    on_ranks(4, world, four)
    return out


@pytest.mark.parametrize("stage, before, after", CHANGES)
def test_a_state_can_be_resumed_in_any_layout(done, resumed, stage, before, after):
    out = resumed / f"{stage}-{before}-{after}"
    curves, weights = differences(done / f"{stage}-{before}", out)
    assert curves < 1e-5 and weights < 1e-5
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4]
    if after != "one":
        digests = json.loads((out / "digests").read_text())
        assert len(digests) == 4 and len(set(digests)) == 1


def test_a_rank_that_died_is_noticed_before_the_next_step():
    def work(rank: int) -> None:
        dist = distributed.init_distributed("cpu")
        assert dist.sum_counts({"rows": 3, "tokens": rank}) == {"rows": 6, "tokens": 1}
        if rank == 1:
            os._exit(9)
        try:
            dist.sum_counts({"rows": 3})
        except UserError as error:
            assert "rank 0: another rank is gone" in str(error) and "the same command goes on" in str(error)
            os._exit(3)

    codes, errors = ended(start(2, work))
    assert codes == [3, 9], errors


def test_the_links_between_two_ranks():
    """Each collective is named with its time; a second rank says nothing."""
    from tools import links

    def work(rank: int) -> None:
        said = []
        links.print = lambda text, **more: said.append(text)
        links.main(["--gigabytes=0.001", "--repeats=1", "--device=cpu"])
        assert [line.split(" of ")[0] for line in said] == ["all-reduce", "broadcast", "all-gather", "reduce-scatter"] * (rank == 0)
        assert all("of 0.001 GB on 2 ranks: " in line and line.endswith(" GB/s") for line in said)

    codes, errors = ended(start(2, work))
    assert codes == [0, 0], errors
    with pytest.raises(UserError, match="one process has no links"):
        links.main(["--device=cpu"])


# -----------------------------------------------------------------------------
# A module that the objective holds next to the student, such as a map between the widths of two models

class WithProbe(train.Objective):
    """Adds SLOPE * (sum of the probe's weights) to the loss of each micro-batch."""
    INIT, SLOPE = 0.5, 0.25

    def __init__(self, *args):
        super().__init__(*args)
        self.probe = nn.Linear(3, 2, bias=False)
        nn.init.constant_(self.probe.weight, self.INIT)

    def forward(self, *args, **more):
        loss, *rest = super().forward(*args, **more)
        return loss + self.SLOPE * self.probe(torch.eye(3)).sum(), *rest


class WithOtherProbe(WithProbe):
    """As after a restart: freshly initialized, with other values."""
    INIT = -7.0


LAYOUTS = {"one": {}, "ddp": dict(parallel="ddp"), "fsdp": dict(parallel="fsdp")}
# 4 micro-batches per step in all layouts: 4 on one rank, or 2 on each of two ranks.
PROBE_RUN = dict(stage="d2s", batch_size=8, micro_batch_size=2, max_steps=2, save_every=1, warmup_ratio=0.0,
                 grad_clip=0.5)


def run_layouts(world: Path, folders: dict[str, Path], Objective: type) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Objective", Objective)
        runs = {layout: dict(out_dir=folder, **PROBE_RUN, **LAYOUTS[layout]) for layout, folder in folders.items()}
        train.main(flags(world, **runs.pop("one")))
        on_ranks(2, world, list(runs.values()))


def state_after(out_dir: Path, step: int) -> dict:
    return torch.load(out_dir / "state" / f"step_{step:08d}.pt", weights_only=True)


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    """Runs of 2 steps, whole-LAYOUT, and the same ones continued after step 1 in a new process, resumed-LAYOUT."""
    out = tmp_path_factory.mktemp("probe")
    train.main(flags(world, out_dir=out / "without", **PROBE_RUN))
    run_layouts(world, {layout: out / f"whole-{layout}" for layout in LAYOUTS}, WithProbe)
    for layout in LAYOUTS:
        unfinish(out / f"whole-{layout}", out / f"resumed-{layout}", step=1)
    run_layouts(world, {layout: out / f"resumed-{layout}" for layout in LAYOUTS}, WithOtherProbe)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_module_of_the_objective_counts_in_the_norm_is_clipped_and_optimized(probed, layout):
    """Its gradient is known: SLOPE from each of 4 micro-batches, which is 1 for each of the 6 weights."""
    norm = records(probed / f"whole-{layout}")[0]["grad_norm"]
    assert norm**2 == pytest.approx(records(probed / "without")[0]["grad_norm"]**2 + 6, rel=1e-5)
    state = state_after(probed / f"whole-{layout}", 1)
    clipped = 0.5 / norm
    adam = state["adam"]["probe.weight"]
    torch.testing.assert_close(adam["exp_avg"], torch.full((2, 3), (1 - 0.9) * clipped), rtol=1e-4, atol=0)
    torch.testing.assert_close(adam["exp_avg_sq"], torch.full((2, 3), (1 - 0.98) * clipped**2), rtol=1e-4, atol=0)
    # Adam's first update is the learning rate, 1e-2, whatever the size of the gradient.
    torch.testing.assert_close(state["weights"]["probe.weight"], torch.full((2, 3), 0.5 - 1e-2), rtol=0, atol=1e-6)
    assert state["weights"].keys() == state["adam"].keys()
    assert {name.split(".")[0] for name in state["weights"]} == {"student", "probe"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_module_of_the_objective_is_resumed_bit_for_bit(probed, layout):
    whole, resumed = (state_after(probed / f"{kind}-{layout}", 2) for kind in ("whole", "resumed"))
    assert "probe.weight" in whole["weights"] and whole["weights"].keys() == resumed["weights"].keys()
    for name in whole["weights"]:
        assert torch.equal(whole["weights"][name], resumed["weights"][name]), name
        for key, value in whole["adam"][name].items():
            assert torch.equal(value, resumed["adam"][name][key]), (name, key)
    logs = [[(record["loss"], record["grad_norm"]) for record in records(probed / f"{kind}-{layout}")]
            for kind in ("whole", "resumed")]
    assert logs[0] == logs[1]


class Pair(nn.Module):
    def __init__(self, student, init):
        super().__init__()
        self.student, self.probe = student, nn.Linear(3, 2)
        nn.init.constant_(self.probe.weight, init)
        nn.init.constant_(self.probe.bias, init)


def save_and_restore(world: Path, mode: str) -> None:
    """After one update: gather, restore into a fresh objective, gather again. Nothing may differ."""
    dist, gathered = distributed.init_distributed("cpu"), []
    for init in (0.5, -7.0):
        student = Llava.from_pretrained(world / ("sparse" if init == 0.5 else "other"))
        student.vision.requires_grad_(False)
        pair = Pair(student, init)
        _, optimizer, trainable = distributed.parallelize(pair, dist, mode, torch.float32, lr=1e-2)
        names = {name for name, _ in pair.named_parameters()}
        assert trainable.keys() == {name for name in names if not name.startswith("student.vision.")}
        if not gathered:
            for parameter in trainable.values():
                parameter.grad = 0.1 * parameter.detach() + 0.01
            optimizer.step()
        else:
            distributed.restore(trainable, optimizer, *dist.all_gather(gathered[0])[0])       # rank 0's
        gathered.append((distributed.gather(trainable, dist), distributed.gather_adam(trainable, optimizer, dist)))
    if dist.rank == 0:
        (weights, adam), (weights_after, adam_after) = gathered
        assert weights.keys() == adam.keys() == trainable.keys() and adam["probe.bias"]["step"] == 1
        for name in weights:
            assert torch.equal(weights[name], weights_after[name]), name
            assert adam[name].keys() == adam_after[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(adam[name][key], adam_after[name][key]) for key in adam[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_restored_bit_for_bit(world, tmp_path, layout):
    """The second objective starts from another student and another probe, so that nothing agrees by chance."""
    shutil.copytree(world, tmp_path / "world")
    other = Llava.from_pretrained(world / "sparse")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.1)
    other.save_pretrained(tmp_path / "world" / "other")

    def work(rank: int) -> None:
        save_and_restore(tmp_path / "world", layout)
        torch_dist.destroy_process_group()

    if layout == "one":
        save_and_restore(tmp_path / "world", "ddp")
    else:
        codes, errors = ended(start(2, work))
        assert codes == [0, 0], errors
