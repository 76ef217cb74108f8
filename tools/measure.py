"""
How tools/bench.py measures: time, memory, and the rows of its tables.

A second on one machine says nothing about another, a ratio says a little more. So every number of ours has a peer, and
what is reported is ours / peer.

- Time: after a warm-up run the sides take turns (A B C A B C ...), so that a slow minute of the machine affects all of
  them alike. A ratio is taken within each round; shown are its median over the rounds, its smallest and its largest.
- Memory: one side in a process of its own, its peak over what it held before. On a CPU that is the resident set, with
  glibc told to return every large block at once (MEMORY_ENV), so that it is memory in use and not malloc's pool; on a
  GPU it is torch.cuda.max_memory_allocated.
- The matrix products of a computation alone, without anything around them, are as fast as the machine can be.
"""
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import Config

MEMORY_ENV = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(runs: dict[object, Callable], options: Config) -> dict[object, list[float]]:
    """Seconds of every run in every round. Each of them has run once already."""
    seconds = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run_once in runs.items():
            began = clock(options.device)
            run_once()
            seconds[name].append(clock(options.device) - began)
    return seconds


def fastest(seconds: dict[object, list[float]]) -> object:
    return min(seconds, key=lambda name: statistics.median(seconds[name]), default=None)


def peak_bytes(run_once: Callable, device: str) -> dict[str, int]:
    """Peak of one run: "above" what the process held before it, and in "total"."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once()
        total = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")                # the high-water mark starts again from here
        before = resident_bytes("VmRSS")
        run_once()
        total = resident_bytes("VmHWM")
    return {"above": total - before, "total": total}


def resident_bytes(field: str) -> int:
    """VmRSS: now; VmHWM: at its highest."""
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024


def bare_products(layers: list[tuple], dtype: torch.dtype, device: str) -> tuple[Callable, float]:
    """The matrix products of linear layers, on operands that exist already -> a run of all of them, and their FLOPs.

    layers: (how many, tokens, inputs, outputs, passes); a pass is "f", the forward product, "x", the gradient of the
    inputs, or "w", that of the weight.
    """
    operands, flops = [], 0.0
    for count, tokens, n_in, n_out, passes in layers:
        shapes = [(tokens, n_in), (n_out, n_in), (tokens, n_out)]
        operands.append((passes * count, *[torch.randn(shape, dtype=dtype, device=device) for shape in shapes]))
        flops += 2.0 * count * tokens * n_in * n_out * len(passes)
    return partial(multiply, operands), flops


def multiply(operands: list[tuple]) -> None:
    for passes, x, weight, grad in operands:
        for kind in passes:
            if kind == "f":
                F.linear(x, weight)
            elif kind == "x":
                grad @ weight
            else:
                grad.T @ x


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Over all results, each relative to its largest entry."""
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in zip(ours, theirs))


def row(case: str, measure: str, unit: str, ours: list[float] | float, peer: list[float] | float | None = None,
        against: str = "", target: str = "") -> dict:
    """A row of a table. What is judged is ours / peer, round by round, or without a peer our number itself."""
    ours, peer = (x if isinstance(x, list) or x is None else [float(x)] for x in (ours, peer))
    each = [a / b for a, b in zip(ours, peer)] if peer else [] if against else ours
    value, met = statistics.median(each) if each else None, None
    if target and each:
        relation, bound = target.split()
        met = value <= float(bound) if relation == "<=" else value >= float(bound)
    return {"case": case, "measure": measure, "unit": unit, "ours": ours, "peer": peer, "against": against,
            "each": each, "value": value, "target": target, "met": met}


def show(row: dict) -> str:
    """As a line of a Markdown table."""
    ours = amount(row["ours"], row["unit"])
    peer = f"{amount(row['peer'], row['unit'])} ({row['against']})" if row["against"] else ""
    value = f"x {row['value']:.3g} ({min(row['each']):.3g} to {max(row['each']):.3g})" if row["peer"] else ""
    met = {True: "met", False: "**missed**", None: ""}[row["met"]]
    return f"| {row['case']} | {row['measure']} | {ours} | {peer} | {value} | {row['target']} | {met} |"


def amount(values: list[float] | None, unit: str) -> str:
    if values is None:
        return "not installed"
    middle = statistics.median(values)
    return f"{middle / 1e6:,.0f} MB" if unit == "B" else f"{middle:,.4g} {unit}"
