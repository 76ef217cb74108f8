"""
Data parallelism: one training step on many GPUs.

torchrun starts one process per GPU, a rank. All ranks run the same program, each on its own part of every batch,
and average their gradients: W ranks compute what one GPU with W times the memory would compute. The layouts differ
in what a rank stores. Bytes per trainable parameter (fp32 weight, gradient, Adam's two averages) on W ranks:

                       weight   gradient   Adam
    one rank              4        4        8      torch.optim.AdamW
    parallel = "ddp"      4        4       8 / W   the model is replicated; each rank updates 1/W of the parameters
                                                   and broadcasts them (DistributedDataParallel with
                                                   ZeroRedundancyOptimizer, "ZeRO-1")
    parallel = "fsdp"    4 / W    4 / W    8 / W   parameters are sharded; each layer is all-gathered before use and
                                                   freed afterwards (fully_shard)

All layouts compute the same numbers, up to rounding: with fsdp in bf16 a trainable embedding is gathered in bf16, so that the
residual stream is bf16 where the others have fp32. A saved state holds full tensors by name: a state written by 16 ranks
with fsdp can be resumed by one rank, or by 4 with ddp.

Besides the backend for gradients (nccl on GPUs) there is a second process group over gloo, the control plane. Its
timeout is 12 hours, because ranks wait there while rank 0 indexes the data or writes 20 GB. It also synchronizes
errors: an exception on one rank ends all ranks, with one line on stderr, instead of leaving the others in a
collective.

How long ranks wait for one that is gone: a third group, over gloo too, sums the counts before each step. It notices a
process that died at once, and waits ten minutes for one whose data is slow or whose machine is lost. The collectives
within a step have only arithmetic between them: NCCL gives up after a minute instead of its ten.
"""
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError, shorten
from moe import SparseFFN


# -----------------------------------------------------------------------------
# Ranks and collectives

@dataclass
class Dist:
    """Rank, world size and collectives; no-ops when world_size == 1.

    All but `all_reduce` and `sum_counts` run on the control plane. Every rank has to call them in the same order, and never nested.
    """
    rank: int
    local_rank: int                            # rank within this machine
    world_size: int
    device: torch.device
    control: torch_dist.ProcessGroup | None    # the control plane; None when world_size == 1
    counts: torch_dist.ProcessGroup | None = None    # for `sum_counts`

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place, over the fast backend."""
        if self.control:
            torch_dist.all_reduce(values)
        return values

    def sum_counts(self, counts: dict[str, int]) -> dict[str, int]:
        """Sum each over the ranks: before every step, so that here is where ranks wait for data, and for the dead."""
        values = torch.tensor(list(counts.values()))
        if self.counts:
            with self.missing_rank():
                torch_dist.all_reduce(values, group=self.counts)
        return dict(zip(counts, values.tolist()))

    def barrier(self) -> None:
        """Wait until every rank is here: where ranks work apart for long, and one that fails says so at once and ends."""
        with self.missing_rank():
            self.all_gather("here")

    @contextmanager
    def missing_rank(self) -> Iterator[None]:
        """A collective that fails because another rank has ended -> UserError."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"rank {self.rank}: another rank is gone ({shorten(reason)}); its own last lines say why; the same "
                            "command goes on from what was saved last") from None

    def all_gather(self, value: object) -> list:
        """The value of every rank, in rank order."""
        gathered = [value]
        if self.control:
            gathered = [None] * self.world_size
            torch_dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def broadcast_from_rank0(self, work: Callable) -> object:
        """Run work() on rank 0 only, and return its result on every rank."""
        with self.sync_errors():
            result = work() if self.rank == 0 else None
        return self.all_gather(result)[0]

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """If the block fails on any rank, end all: the first that failed raises its error, the others exit silently."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [rank for rank, has_failed in enumerate(self.all_gather(error is not None)) if has_failed]
        if failed and failed[0] == self.rank:
            raise error
        if failed:
            raise SystemExit(2)

    def local_rank0_first(self, work: Callable) -> object:
        """Run work() on one rank per machine, then on the others, which find the files it left on the disk."""
        for local_rank0 in (True, False):
            with self.sync_errors():
                if (self.local_rank == 0) == local_rank0:
                    result = work()
        return result

    def assert_same(self, facts: dict[str, object]) -> dict[str, object]:
        """Raise a UserError unless all ranks hold the same values, such as settings. -> those of rank 0.

        {} from a rank is not compared: one rank per machine is enough to digest the files that the others share.
        """
        facts_by_rank = self.all_gather(facts)
        with self.sync_errors():
            for key, value in facts_by_rank[0].items():
                for rank, other in enumerate(facts_by_rank):
                    if other and other.get(key) != value:
                        raise UserError(f"{key} is {value!r} on rank 0, but {other.get(key)!r} on rank {rank}; "
                                        "every rank has to run the same command on the same files")
        return facts_by_rank[0]


def init_distributed(device: str, tf32: bool = False, deterministic: bool = False, patience: int = 60,
                     gradients: bool = True) -> Dist:
    """Join the process group that torchrun describes in the environment. `device`: cpu, cuda or "" (cuda if any).

    gradients: whether the ranks exchange any. Without, `all_reduce` is over gloo as well, and NCCL is not started.
    On a GPU, tf32: fp32 products with 10 bits of mantissa, eight times as fast; deterministic: no atomic additions;
    patience: seconds until NCCL takes a rank for dead.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    use_cuda = device == "cuda" or (not device and torch.cuda.is_available())
    device = torch.device(f"cuda:{local_rank}" if use_cuda else "cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        # In a bf16 run the products left in fp32 are few and meant to be exact: routers, cosines, pd's output head.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.utils.deterministic.fill_uninitialized_memory = False
            torch.use_deterministic_algorithms(True)
    control = counts = None
    if world_size > 1:
        if not torch_dist.is_initialized():
            store, _, _ = next(torch_dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
                # After a restart (--max_restarts), torchrun's store still holds the addresses of the ranks that died;
                # a key prefix per restart hides them. Several machines count their restarts separately: set
                # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun there, which then creates a new store.
                restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
                store = torch_dist.PrefixStore(f"restart {restart}", store)
            use_nccl = use_cuda and gradients
            torch_dist.init_process_group("nccl" if use_nccl else "gloo", store=store, rank=rank,
                                          world_size=world_size, device_id=device if use_nccl else None,
                                          timeout=timedelta(seconds=patience) if use_nccl else None)
        control = torch_dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        counts = torch_dist.new_group(backend="gloo", timeout=timedelta(minutes=10))
    return Dist(rank, local_rank, world_size, device, control, counts)


# -----------------------------------------------------------------------------
# The three layouts

def parallelize(objective: nn.Module, dist: Dist, mode: str, dtype: torch.dtype,
                **adam) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """-> the objective to call, AdamW (with the settings `adam`), and the trainable parameters by name.

    `trainable` is the one list of what is optimized, clipped, saved and restored: whatever the objective holds that
    requires a gradient, the student's parameters as "student.…" and those of any module next to it.
    With several ranks gradients are averaged: multiply the loss by world_size to get their sum.
    """
    # What only several ranks use is imported here and below, not above: it takes as long as half of torch.
    assert mode in ("ddp", "fsdp"), mode
    if dist.world_size > 1 and mode == "fsdp":
        apply_fsdp(objective, dist, dtype)
    trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}     # FSDP has replaced them
    parameters = list(trainable.values())
    if dist.world_size > 1 and mode == "ddp":
        for parameter in parameters:                                 # DDP makes them views of the buckets that it sends
            parameter.grad = torch.zeros_like(parameter)
        device_ids = [dist.device] if dist.device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True)
        from torch.distributed.optim import ZeroRedundancyOptimizer
        optimizer = ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, fused=True, **adam)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True, **adam)
    return objective, optimizer, trainable


def apply_fsdp(objective: nn.Module, dist: Dist, dtype: torch.dtype) -> None:
    """FSDP: shard every parameter. Each fully_shard call makes one group of parameters that are gathered together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # cast_forward_inputs=False: inputs keep their dtype, since rotary angles need fp32.
    fp32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    mixed = fp32
    if dtype == torch.bfloat16:                                      # all-gather in bf16, reduce gradients in fp32
        mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    student = objective.student
    for block in student.decoder.blocks:
        if isinstance(block.ffn, SparseFFN):
            for expert in block.ffn.experts:
                fully_shard(expert, mesh=mesh, mp_policy=mixed)
            fully_shard(block.ffn, mesh=mesh, mp_policy=fp32)        # what remains is the router: routing is in fp32
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    # The rest: embedding, head, adaptor, and modules of the objective alone. They stay gathered until the backward pass
    # is over, since the loss uses the head. The ViT is frozen and runs outside of the objective: it is replicated.
    fully_shard(objective, mesh=mesh, mp_policy=mixed, reshard_after_forward=False,
                ignored_params=set(student.vision.parameters()))


def no_sync(objective: nn.Module) -> AbstractContextManager:
    """Skip DDP's all-reduce in all micro-batches but the last.

    FSDP reduces in every micro-batch, because a rank has no room for the unsharded gradients of the model.
    """
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else nullcontext()


def reshard(objective: nn.Module) -> None:
    """FSDP: free what a forward pass without a backward pass has left gathered (see `apply_fsdp`)."""
    if hasattr(objective, "reshard"):
        objective.reshard()


def zero_grad(objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients.

    With DDP they stay, as zeros, since they are views of its buckets: a micro-batch under no_sync would otherwise make new
    ones next to the buckets, 8 bytes per parameter instead of 4.
    """
    optimizer.zero_grad(set_to_none=not isinstance(objective, DistributedDataParallel))


# -----------------------------------------------------------------------------
# Saving and restoring: full tensors by name, whatever the layout

def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether FSDP has made it a DTensor."""
    return hasattr(tensor, "full_tensor")


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of an FSDP shard. A collective: every rank has to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank stores."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The inverse of `full`: lay a full tensor out like `parameter`."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements,
                             src_data_rank=None)


def gather(tensors: dict[str, torch.Tensor], dist: Dist) -> dict[str, torch.Tensor]:
    """Full tensors in the CPU memory of rank 0, gathered one at a time; {} on the other ranks."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor = full(tensor.detach())
        if dist.rank == 0:
            gathered[name] = tensor.cpu()
    return gathered


def gather_adam(trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
                dist: Dist) -> dict[str, dict[str, torch.Tensor]]:
    """{parameter name: {"step", "exp_avg", "exp_avg_sq"}} on rank 0, {parameter name: {}} on the others."""
    adamw = local_optimizer(optimizer)
    owners = {}                                                      # ZeRO: exactly one rank has a parameter's averages
    if adamw is not optimizer:
        owned = [name for name, parameter in trainable.items() if parameter in adamw.state]
        for rank, names in enumerate(dist.all_gather(owned)):
            owners |= dict.fromkeys(names, rank)
    adam = {}
    for name, parameter in trainable.items():
        owner, state = owners.get(name, 0), adamw.state.get(parameter, {})
        adam[name] = gather(state, dist) if owner == 0 else send_adam_to_rank0(state, parameter, owner, dist)
    return adam


def send_adam_to_rank0(state: dict, parameter: nn.Parameter, owner: int, dist: Dist) -> dict[str, torch.Tensor]:
    """ZeRO: move one parameter's averages from the rank that owns them to rank 0."""
    received = {}
    for key, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
        if dist.rank == owner:
            torch_dist.send(state[key].cpu(), 0, group=dist.control)
        elif dist.rank == 0:
            received[key] = torch.empty(shape)
            torch_dist.recv(received[key], owner, group=dist.control)
    return received


def restore(trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, weights: dict[str, torch.Tensor],
            adam: dict[str, dict[str, torch.Tensor]]) -> None:
    """The inverse of `gather` and `gather_adam`: every rank takes its shards from the full tensors."""
    adamw = local_optimizer(optimizer)
    owned = {parameter for group in adamw.param_groups for parameter in group["params"]}
    for name, parameter in trainable.items():
        parameter.data.copy_(shard(weights[name], parameter))
        if parameter in owned:
            state = {"step": adam[name]["step"].to(parameter.device, copy=True)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter).copy_(shard(adam[name][key], parameter))
            adamw.state[parameter] = state


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The AdamW of this rank, which ZeroRedundancyOptimizer wraps as its `optim`."""
    return getattr(optimizer, "optim", optimizer)
