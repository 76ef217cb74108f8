"""
How one step is parallelize over several GPUs.

torchrun starts one process per GPU, a rank. Every rank runs this same program on its own share of each batch, and once
per step the ranks add up their gradients, so that together they do what one GPU with a huge memory would have done.
What they need not all do is keep the same things. Bytes per parameter that learns (fp32 weight, gradient, two averages
of Adam), on each of W ranks:

                        weight   gradient   Adam     who has what
    one rank               4        4        8       everything in one place: torch.optim.AdamW
    parallel = "ddp"       4        4        8 / W   everybody has the model; each updates 1/W of it and hands that round
                                                     (DistributedDataParallel, ZeroRedundancyOptimizer)
    parallel = "fsdp"     4 / W    4 / W     8 / W   nobody has the model; a layer is put together when its turn comes and
                                                     taken apart right after (fully_shard)

All three compute the same numbers, and what is saved does not show which of them ran: a state written by 16 ranks with
fsdp goes on with one rank, or with 4 and ddp.

Beside the GPUs' own connection (nccl) the ranks keep a slow one between their CPUs (gloo), the control plane. It may wait
for hours without anybody giving up: while one rank reads the data for all, or writes 20 GB. Over it the ranks also agree
to fail together, so that one rank's error ends all of them, in one line, instead of leaving the others waiting.
"""
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from moe import SparseFFN


# -----------------------------------------------------------------------------
# Who is here

@dataclass
class Dist:
    """This process among its peers. With one process alone every method is a formality.

    All but `all_reduce` use the control plane; the ranks call them in the same order, never one inside another.
    """
    rank: int
    local_rank: int                        # among the ranks of this machine
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None      # the control plane; None: alone

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place. Over the fast connection: for every step."""
        if self.control:
            dist.all_reduce(values)
        return values

    def all_gather(self, value: object) -> list:
        """What each rank has to say, in the order of ranks."""
        said = [value]
        if self.control:
            said = [None] * self.world_size
            dist.all_gather_object(said, value, group=self.control)
        return said

    def broadcast_from_rank0(self, work: Callable) -> object:
        """work() done by rank 0 alone, its result known to all."""
        with self.sync_errors():
            result = work() if self.rank == 0 else None
        return self.all_gather(result)[0]

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """If the block fails on any rank, all end here: the first that failed with its error, the others quietly."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [rank for rank, says_so in enumerate(self.all_gather(error is not None)) if says_so]
        if failed and failed[0] == self.rank:
            raise error
        if failed:
            raise SystemExit(2)

    def local_rank0_first(self, work: Callable) -> object:
        """work() on one rank of each machine, then on the rest, which find what it left on the disk."""
        for first in (True, False):
            with self.sync_errors():
                if (self.local_rank == 0) == first:
                    result = work()
        return result

    def assert_same(self, facts: dict[str, object]) -> None:
        """End all ranks with a UserError if they do not hold the same facts, such as settings or a file's digest."""
        everybody = self.all_gather(facts)
        with self.sync_errors():
            for key, value in everybody[0].items():
                for rank, theirs in enumerate(everybody):
                    if theirs.get(key) != value:
                        raise UserError(f"{key} is {value!r} on rank 0, but {theirs.get(key)!r} on rank {rank}; every "
                                          "rank has to run the same command on the same files")


def init_distributed(device: str) -> Dist:
    """Find the other ranks, which torchrun has told us of in the environment. `device`: cpu, cuda or "" (choose)."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    use_cuda = device == "cuda" or (not device and torch.cuda.is_available())
    device = torch.device(f"cuda:{local_rank}" if use_cuda else "cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                   # tf32 for what autocast leaves in fp32
    control = None
    if world_size > 1:
        if not dist.is_initialized():
            store, _, _ = next(dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
                # After --max_restarts, torchrun's store still holds the addresses of the ranks that died. So each life of
                # a run gets a drawer of its own. (With several machines, which count their restarts each for itself, set
                # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun: then it makes a new store.)
                store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if use_cuda else "gloo", store=store, rank=rank, world_size=world_size,
                                    device_id=device if use_cuda else None)
        control = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    return Dist(rank, local_rank, world_size, device, control)


# -----------------------------------------------------------------------------
# Who computes and keeps what

def parallelize(objective: nn.Module, ranks: Dist, parallel: str, dtype: torch.dtype,
           **settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The objective as every rank runs it, and AdamW (with `settings`) over its share of what learns.

    Either way gradients are averaged over the ranks: multiply the loss by their number to get the sum.
    """
    optimizer = torch.optim.AdamW
    if ranks.world_size > 1 and parallel == "fsdp":
        apply_fsdp(objective, ranks, dtype)
    elif ranks.world_size > 1:
        objective = DistributedDataParallel(objective, device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                                            gradient_as_bucket_view=True)
        optimizer, settings = ZeroRedundancyOptimizer, settings | {"optimizer_class": torch.optim.AdamW}
    learns = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    return objective, optimizer(learns, fused=True, **settings)


def apply_fsdp(objective: nn.Module, ranks: Dist, dtype: torch.dtype) -> None:
    """FSDP: cut every weight into `world_size` pieces. What is sharded together is also put together at one time."""
    low = MixedPrecisionPolicy(cast_forward_inputs=False)            # inputs as they are: rotary angles need fp32
    if dtype == torch.bfloat16:
        low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)   # weights travel in bf16
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    student = objective.student
    for block in student.decoder.blocks:
        if isinstance(block.ffn, SparseFFN):
            for expert in block.ffn.experts:
                fully_shard(expert, mesh=mesh, mp_policy=low)
            fully_shard(block.ffn, mesh=mesh, mp_policy=exact)       # what is left of it, the router: routing is in fp32
        fully_shard(block, mesh=mesh, mp_policy=low)
    # The rest: embedding, head and adaptor. They stay together until the backward pass is over, since the head is used
    # by the loss. The ViT is frozen and runs outside of the objective; every rank keeps it whole.
    fully_shard(objective, mesh=mesh, mp_policy=low, reshard_after_forward=False,
                ignored_params=set(student.vision.parameters()))


def no_sync(objective: nn.Module):
    """While gradients pile up over micro-batches, DDP's ranks need not exchange them; the last pass does.

    FSDP's do so each time, because a rank has no room for the gradients of the whole model.
    """
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else nullcontext()


# -----------------------------------------------------------------------------
# Whole tensors by name, however they are kept: what is saved, and what is read back

def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which FSDP's ranks have a piece each. Every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, torch.Tensor], ranks: Dist) -> dict[str, torch.Tensor]:
    """Every tensor whole in rank 0's CPU memory, put together one at a time; the other ranks get {}."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor = full(tensor.detach())
        if ranks.rank == 0:
            gathered[name] = tensor.cpu()
    return gathered


def gather_adam(learns: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
                ranks: Dist) -> dict[str, dict[str, torch.Tensor]]:
    """{parameter name: {"step", "exp_avg", "exp_avg_sq"}} on rank 0, {} on the others."""
    local = local_optimizer(optimizer)
    owners = {}                                                      # ZeRO: exactly one rank has a parameter's averages
    if local is not optimizer:
        for rank, names in enumerate(ranks.all_gather([name for name, p in learns.items() if p in local.state])):
            owners |= dict.fromkeys(names, rank)
    adam = {}
    for name, parameter in learns.items():
        owner, state = owners.get(name, 0), local.state.get(parameter, {})
        adam[name] = gather(state, ranks) if owner == 0 else fetch_adam(state, parameter, owner, ranks)
    return adam


def fetch_adam(state: dict, parameter: nn.Parameter, owner: int, ranks: Dist) -> dict[str, torch.Tensor]:
    """One parameter's averages from the rank that has them to rank 0."""
    fetched = {}
    for key, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
        if ranks.rank == owner:
            dist.send(state[key].cpu(), 0, group=ranks.control)
        elif ranks.rank == 0:
            fetched[key] = torch.empty(shape)
            dist.recv(fetched[key], owner, group=ranks.control)
    return fetched


def restore(learns: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, weights: dict[str, torch.Tensor],
            adam: dict[str, dict[str, torch.Tensor]]) -> None:
    """Give every rank its share of what `gather` and `gather_adam` once collected."""
    local = local_optimizer(optimizer)
    mine = {parameter for group in local.param_groups for parameter in group["params"]}
    for name, parameter in learns.items():
        parameter.data.copy_(shard(weights[name], parameter))
        if parameter in mine:
            local.state[parameter] = {"step": adam[name]["step"].to(parameter.device, copy=True)}
            for key in ("exp_avg", "exp_avg_sq"):
                local.state[parameter][key] = torch.zeros_like(parameter).copy_(shard(adam[name][key], parameter))


def shard(full: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a tensor that is shaped like the parameter: all, or with FSDP its piece."""
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The AdamW that works on this rank: ZeRO's is inside."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
