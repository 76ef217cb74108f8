"""
What the links between GPUs give, for the columns of tools/plan.py.

    torchrun --nproc_per_node=8 -m tools.links                                              within a machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -m tools.links      on both of two

Each collective of a training step on a tensor of that size. Bus bandwidth is what nccl-tests call so: the bytes that each
GPU has to send on a ring, by the time. Within a machine of A100s it should be that of NVLink, between machines that of
their network cards together; far below it, NCCL has chosen another network (NCCL_DEBUG=INFO says which).
"""
from collections.abc import Callable

import torch
import torch.distributed as torch_dist

from configurator import POSITIVE, UserError, check_values, load_config, run
from engine.distributed import Dist, init_distributed
from tools.measure import clock

DEFAULTS = dict(
    gigabytes=1.0,              # of the tensor
    repeats=10,                 # after one to warm up
    device="",                  # cpu | cuda; empty: cuda if there is one
)


def main(argv: list[str]) -> None:
    options = load_config(DEFAULTS, argv)
    check_values(options, {"gigabytes": POSITIVE, "repeats": POSITIVE, "device": ["", "cpu", "cuda"]})
    dist = init_distributed(options.device)
    if dist.world_size == 1:
        raise UserError("one process has no links: start it with torchrun --nproc_per_node=…")
    W = dist.world_size
    whole = torch.ones(W * max(1, round(options.gigabytes * 1e9 / 4 / W)), device=dist.device)
    part = torch.ones(len(whole) // W, device=dist.device)
    collectives = {   # how often a ring sends the tensor, but for one W-th of it
        "all-reduce": (2, lambda: torch_dist.all_reduce(whole)),
        "broadcast": (1, lambda: torch_dist.broadcast(whole, 0)),
        "all-gather": (1, lambda: torch_dist.all_gather_into_tensor(whole, part)),
        "reduce-scatter": (1, lambda: torch_dist.reduce_scatter_tensor(part, whole)),
    }
    for name, (times, collective) in collectives.items():
        seconds = seconds_of(collective, options.repeats, dist)
        if dist.rank == 0:
            bandwidth = times * (W - 1) / W * whole.nbytes / seconds
            print(f"{name} of {whole.nbytes / 1e9:.3g} GB on {W} ranks: {seconds * 1e3:,.1f} ms, bus bandwidth "
                  f"{bandwidth / 1e9:,.1f} GB/s", flush=True)
    torch_dist.destroy_process_group()


def seconds_of(collective: Callable, repeats: int, dist: Dist) -> float:
    collective()
    began = clock(dist.device.type)
    for _ in range(repeats):
        collective()
    return (clock(dist.device.type) - began) / repeats


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
