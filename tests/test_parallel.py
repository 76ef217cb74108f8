"""
parallel.py: several ranks compute what one does, whatever each of them keeps, and a state written by any number of them in
any layout goes on in any other.

    python -m pytest tests/test_parallel.py
"""
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from engine import distributed
from kill_study import ended, start
from test_train import STAGES, flags, records


def on_ranks(nproc: int, world: Path, runs: list[dict]) -> None:
    """The runs one after another on so many ranks, which note in out_dir/digests what each one's weights were at the end."""
    def work(rank: int) -> None:
        seen, spread = {}, distributed.parallelize

        def watched(objective, ranks, *rest, **more):
            seen["student"], seen["ranks"] = objective.student, ranks
            return spread(objective, ranks, *rest, **more)

        distributed.parallelize = watched
        for settings in runs:
            train.main(flags(world, **settings))
            digest = hashlib.sha256()
            for name, parameter in sorted(seen["student"].named_parameters()):
                digest.update(distributed.full(parameter.detach()).float().numpy().tobytes())
            digests = seen["ranks"].everybody(digest.hexdigest())
            if rank == 0:
                (Path(settings["out_dir"]) / "digests").write_text(json.dumps(digests))
        dist.destroy_process_group()

    codes, errors = ended(start(nproc, work), 300)
    assert codes == [0] * nproc, errors


def differences(a: Path, b: Path) -> tuple[float, float]:
    """The largest difference between the loss curves, and between the exported weights."""
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    weights = max((first[key].float() - second[key].float()).abs().max().item() for key in first if first[key].numel())
    curves = max(abs(x[key] - y[key]) for x, y in zip(records(a), records(b), strict=True) for key in ("loss", "grad_norm"))
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
    """Every stage on 1 rank, and on 2 with ddp and with fsdp, 3 rows (pd: pairs) accumulated; gradients are clipped."""
    out = tmp_path_factory.mktemp("parallel")
    common = dict(batch_size=12, max_steps=4, save_every=2, grad_clip=0.5)
    for stage in STAGES:
        train.main(flags(world, stage, out / f"{stage}-one", **common | dict(micro_batch_size=12)))
        train.main(flags(world, stage, out / f"{stage}-checkpointing", **common | dict(micro_batch_size=12, checkpointing=True)))
    runs = [dict(stage=stage, out_dir=out / f"{stage}-{layout}", **common | dict(micro_batch_size=2, parallel=layout))
            for stage in STAGES for layout in ("ddp", "fsdp")]
    runs += [dict(stage="d2s", out_dir=out / f"d2s-{layout}-checkpointing",
                  **common | dict(micro_batch_size=2, parallel=layout, checkpointing=True)) for layout in ("ddp", "fsdp")]
    on_ranks(2, world, runs)
    return out


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_compute_what_one_does(done, stage, layout):
    """Adam is ZeRO's with ddp. Sums in another order: 1e-5, on weights that moved by 1e-2."""
    curves, weights = differences(done / f"{stage}-one", done / f"{stage}-{layout}")
    assert curves < 1e-5 and weights < 1e-5
    digests = json.loads((done / f"{stage}-{layout}" / "digests").read_text())
    assert len(digests) == 2 and len(set(digests)) == 1              # both ranks hold the same bits


@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_changes_nothing(done, stage):
    assert differences(done / f"{stage}-one", done / f"{stage}-checkpointing") == (0.0, 0.0)
    if stage == "d2s":
        for layout in ("ddp", "fsdp"):
            assert differences(done / f"{stage}-{layout}", done / f"{stage}-{layout}-checkpointing") == (0.0, 0.0)


def test_the_folder_and_the_state_do_not_show_who_wrote_them(done):
    """The same files, the same tensors under the same names, in the same dtypes and shapes."""
    def shapes(tensors):
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    one = done / "d2s-one"
    state = torch.load(one / "state" / "step_00000004.pt", weights_only=True)
    for layout in ("ddp", "fsdp"):
        other = done / f"d2s-{layout}"
        files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "digests"} for folder in (one, other)]
        assert files[0] == files[1]
        assert shapes(load_file(one / "model.safetensors")) == shapes(load_file(other / "model.safetensors"))
        theirs = torch.load(other / "state" / "step_00000004.pt", weights_only=True)
        assert shapes(state["weights"]) == shapes(theirs["weights"])
        assert {name: shapes(adam) for name, adam in state["adam"].items()} == \
               {name: shapes(adam) for name, adam in theirs["adam"].items()}


# Who saved at step 2, and who goes on: 1 rank, 2 with ddp or fsdp; then 1 or 4. align has four tensors that learn, so that
# with ddp on 4 ranks some of ZeRO's optimizers are nearly empty.
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
def test_a_state_goes_on_in_any_layout(done, resumed, stage, before, after):
    out = resumed / f"{stage}-{before}-{after}"
    curves, weights = differences(done / f"{stage}-{before}", out)
    assert curves < 1e-5 and weights < 1e-5
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4]
    if after != "one":
        digests = json.loads((out / "digests").read_text())
        assert len(digests) == 4 and len(set(digests)) == 1

