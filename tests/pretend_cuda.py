"""
A GPU that is not there: real CPU tensors, of which some pretend to be on "cuda:0".

    with pretend_cuda() as gpu:
        x = torch.zeros(3, device="cuda")      # x.device is cuda:0, x.tolist() works, and
        x + torch.ones(3)                      # RuntimeError: Expected all tensors to be on the same device
    gpu.waits                                  # where the CPU had to wait for the GPU: {"train.py:370 item": 1, ...}

Which device a tensor is on is a mark at its storage, which all of its views share. Two of torch's modes see every
call: a function mode what Python says (`.device`, `.to`, `device=`), a dispatch mode every operation that this leads
to, the backward pass included. It gives marks to results, refuses what CUDA refuses, and counts waits. A wait is any
point where the CPU cannot go on before the GPU has done all its work so far: reading a number, or a shape that depends
on one, as after a selection by a mask; a copy that is not `non_blocking`.

What it cannot know: kernels, their speed, their memory, their rounding; NCCL; more than one GPU.
"""
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.nn.utils import clip_grad
from torch.utils import checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).resolve().parent.parent)
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
Tensor = torch.Tensor

# Operations that have to tell the CPU a number, and how often. Indices made from masks count in `Operations`.
WAITS = {"nonzero": 1, "masked_select": 1, "masked_scatter_backward": 1, "equal": 1, "unique": 1, "_unique2": 1,
         "bincount": 2, "repeat_interleave": 1}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
PARSE_TO = torch._C._nn._parse_to    # with which nn.Module.to reads its arguments
DEVICE, IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__
READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
         Tensor.__format__, Tensor.__repr__, Tensor.__contains__}


def device_of(tensor: Tensor) -> torch.device | None:
    """None: made inside of a backward formula; it is on whichever device it is used."""
    return getattr(tensor.untyped_storage(), "pretended_device", CPU)


def put(tensor: Tensor, device: torch.device | None) -> Tensor:
    tensor.untyped_storage().pretended_device = device
    return tensor


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


def as_device(value: object) -> torch.device | None:
    """cuda:0 or another device if `value` names one; None if it is something else."""
    if isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "meta") or isinstance(value, torch.device):
        device = torch.device(value)
        return CUDA if device.type == "cuda" else device
    return None


class Gpu:
    """What the two modes share."""

    def __init__(self):
        self.waits = Counter()
        self.matmul_precision = None     # what was asked for with torch.set_float32_matmul_precision
        self.call = None             # device and arguments of the call from Python that is being carried out

    def device_of_new(self) -> torch.device | None:
        """Of a tensor that an operation makes without any other. None: a formula in C++ made it for its own use."""
        device, args, kwargs = self.call or (None, (), {})
        return device or (None if self.call is None or tensors_in((args, kwargs)) else CPU)

    def wait(self, what: str, times: int = 1) -> None:
        self.waits[f"{place()} {what}"] += times


def place() -> str:
    """File and line of the project that the current operation comes from."""
    frame = sys._getframe(1)
    while frame and (not frame.f_code.co_filename.startswith(ROOT) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


class Calls(TorchFunctionMode):
    """What Python says to torch."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == DEVICE:
            return device_of(args[0])
        if function == IS_CUDA:
            return device_of(args[0]) == CUDA
        if function is Tensor.backward:                              # its Python code, as in checkpoints, is seen too
            with self:
                return torch.autograd.graph._engine_run_backward(
                    (args[0],), (torch.ones_like(args[0]),), False, False, (), allow_unreachable=True, accumulate_grad=True)
        if function is Tensor.pin_memory:
            return args[0]
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.to(function, *args, **kwargs)
        if function is Tensor.numpy and device_of(args[0]) == CUDA:
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({place()})")
        if function in READS and device_of(args[0]) == CUDA:
            self.gpu.wait(function.__name__)
        device = as_device(kwargs.get("device")) if function is not PARSE_TO else None
        if device == CUDA:
            kwargs["device"] = CPU
            if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
                self.gpu.wait("copy of Python numbers")
        before, self.gpu.call = self.gpu.call, (device, args, kwargs)
        try:
            result = function(*args, **kwargs)
        finally:
            self.gpu.call = before
        if device == CUDA:
            for tensor in tensors_in(result):
                put(tensor, CUDA)
        return result

    def to(self, function, tensor: Tensor, *args, non_blocking: bool = False, copy: bool = False, **kwargs) -> Tensor:
        values = [*args, *kwargs.values()]
        target = {Tensor.cpu: CPU, Tensor.cuda: CUDA}.get(function)
        for value in values:
            target = device_of(value) if isinstance(value, Tensor) else as_device(value) or target
        dtypes = [value if isinstance(value, torch.dtype) else value.dtype for value in values
                  if isinstance(value, (torch.dtype, Tensor))]
        result = tensor.to(dtypes[0]) if dtypes else tensor
        source = device_of(tensor)
        if target is None or target == source:
            return result.clone() if copy and result is tensor else result
        if target.type == "meta":
            return result.to("meta")
        if not non_blocking or target == CPU:
            self.gpu.wait("copy to the CPU" if target == CPU else "copy to the GPU")
        result = result.clone() if result is tensor else result
        return put(result, target)


class Operations(TorchDispatchMode):
    """What torch does, below autograd."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False                                                 # nothing is compiled here, and the guard is slow

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():                        # our own questions about tensors are no calls
            return self.run(function, args, kwargs or {})

    def run(self, function, args: tuple, kwargs: dict) -> object:
        tensors, name = tensors_in((args, kwargs)), function._schema.name.split("::")[1]
        devices = {device_of(tensor) for tensor in tensors} - {None}
        if CUDA in devices:
            self.count_waits(name, args, kwargs)
            if CPU in devices:
                self.check(function, name, args, tensors)
        out = function(*args, **kwargs)
        device = CUDA if CUDA in devices else CPU if devices else self.gpu.device_of_new()
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        for tensor in tensors_in(out):
            if tensor.untyped_storage()._cdata not in known:
                put(tensor, device)
            elif device_of(tensor) is None and function._schema.is_mutable:
                put(tensor, device)
        return out

    def check(self, function, name: str, args: tuple, tensors: list[Tensor]) -> None:
        """Raise unless CUDA allows these CPU tensors next to the GPU's."""
        on_cpu = [tensor for tensor in tensors if device_of(tensor) == CPU]
        if name == "copy_":
            return
        written = function._schema.is_mutable and isinstance(args[0], Tensor) and device_of(args[0]) == CPU
        if name in INDEXING and device_of(args[0]) == CUDA:          # indices may be on the CPU, and are copied
            on_cpu = [tensor for tensor in on_cpu if not any(tensor is index for index in args[1])]
        if torch.Tag.pointwise in function.tags or name in INDEXING:  # and so may a single number
            on_cpu = [tensor for tensor in on_cpu if tensor.ndim > 0]
        if on_cpu or written:
            found = ", ".join(f"{tuple(tensor.shape)} on {device_of(tensor)}" for tensor in tensors[:4])
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                               f"cpu! ({name} at {place()}: {found})")

    def count_waits(self, name: str, args: tuple, kwargs: dict) -> None:
        if name in WAITS and kwargs.get("output_size") is None:
            self.gpu.wait(name, WAITS[name])
        if name == "copy_" and device_of(args[0]) != device_of(args[1]) and not (len(args) > 2 and args[2]):
            self.gpu.wait(name)
        if name in INDEXING and device_of(args[0]) == CUDA:
            for index in filter(lambda index: index is not None, args[1]):
                if index.dtype == torch.bool:
                    self.gpu.wait(f"{name} by a mask")
                elif device_of(index) == CPU:
                    self.gpu.wait(f"{name} by an index on the CPU")


@contextmanager
def pretend_cuda() -> Iterator[Gpu]:
    on_cpu = lambda device: "cpu" if str(device).startswith("cuda") else device
    is_enabled, get_dtype, start = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast.__init__
    group = clip_grad._group_tensors_by_device_and_dtype
    gpu = Gpu()
    with ExitStack() as stack:
        for target, name, replacement in (
                (torch, "is_autocast_enabled", lambda device="cuda": is_enabled(on_cpu(device))),
                (torch, "get_autocast_dtype", lambda device: get_dtype(on_cpu(device))),
                (torch.autocast, "__init__", lambda self, device_type, *more, **rest: start(self, on_cpu(device_type), *more, **rest)),
                (clip_grad, "_group_tensors_by_device_and_dtype", lambda lists: {
                    (device_of(lists[0][0]), dtype): groups for (_, dtype), groups in group(lists).items()}),
                (torch, "set_float32_matmul_precision", lambda precision: setattr(gpu, "matmul_precision", precision)),
                (torch.cuda, "is_available", lambda: True), (torch.cuda, "set_device", lambda device: None),
                # A CUDA build of torch would otherwise ask its driver, for pinned memory and in Adam's check of CUDA graphs.
                (torch.accelerator, "current_accelerator", lambda check_available=False: None),
                (torch.cuda, "max_memory_allocated", lambda: 10**9), (torch.cuda, "synchronize", lambda: gpu.wait("synchronize")),
                (torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))):
            stack.enter_context(patch.object(target, name, replacement))
        # It compares the devices of what it kept and of what it computes again, outside of the function mode.
        shapes = {"default": lambda tensor: tensor.shape}
        stack.enter_context(patch.dict(checkpoint._allowed_determinism_checks_to_fns, shapes))
        stack.enter_context(Operations(gpu))
        stack.enter_context(Calls(gpu))
        yield gpu
