"""
Speed and memory of this code beside what a user would otherwise run, as ratios from one and the same run.

    python bench.py                                  all sections: loss, moe, step, generate, data, cache
    python bench.py loss moe --repeats=3             some of them, with fewer rounds
    python bench.py --quick                          toy sizes, which tell whether both sides agree and nothing else

A second on one machine says nothing about another, a ratio says a little more. So every number of ours stands next to a
peer's: transformers running the same checkpoint, the textbook formula on full logits, the dense FFN, the bare matrix
products. Widths and vocabulary are real (Qwen2-0.5B, Qwen1.5-1.8B, CLIP-L, 151,936 tokens), layers are few and weights
random. Each section first shows that both sides compute the same, then how fast they are and how much they need.

- Time: after a run to warm up, the sides take turns (A B C A B C ...), so that a slow minute of the machine hits all of
  them alike. A ratio is taken within each round; shown are its median over the rounds, its smallest and its largest.
- Memory: one side in a process of its own, its peak over what it held before. On a CPU that is the resident set, with
  glibc told to return every large block at once (MEMORY_ENV), so that it is memory in use and not malloc's hoard; on a
  GPU it is torch.cuda.max_memory_allocated.

The tables go to the screen, every raw number to bench.json. A missed target is printed like a met one.
"""
import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import losses
import train
from configurator import Config
from engine import chunked
from engine.files import write_text as write_file
from model import DECODERS, FFN, DecoderConfig, Llava, LlavaConfig, VisionConfig
from moe import SparseFFN, upcycle
from tools import plan

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if HAS_TRANSFORMERS:
    import transformers
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Initializing zero-element")               # its shared expert of width 0

MEMORY_ENV = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
EXPERTS = ["eager", "grouped_mm"]     # transformers' ways to run experts; the faster one counts
IMAGE_ID = 151646

qwen2, qwen15 = DECODERS["Qwen/Qwen2-0.5B"], DECODERS["Qwen/Qwen1.5-1.8B"]
REAL = {
    "loss": dict(tokens=1024, vocab=151936, student=896, teacher=3584),
    "moe": dict(tokens=2048, width=896, n_ffn=4864),
    "step": dict(student=replace(qwen2, n_layer=8), teacher=replace(qwen15, n_layer=8), vision=VisionConfig(n_layer=4),
                 rows=2, text=128, dtype="bfloat16"),
    "generate": dict(student=replace(qwen2, n_layer=4), vision=VisionConfig(n_layer=2), rows=16, text=32, new=64),
    "data": dict(images=64, side=336, rows=100_000),
}
REAL["cache"] = REAL["step"]
small, small_vision = DecoderConfig(151_656, 32, 2, 4, 2, 48, tied=True), VisionConfig(28, 14, 32, 2, 4, 64)
QUICK = {
    "loss": dict(tokens=24, vocab=515, student=16, teacher=32),
    "moe": dict(tokens=48, width=32, n_ffn=64),
    "step": dict(student=small, teacher=replace(small, n_embd=48, n_ffn=64, tied=False), vision=small_vision,
                 rows=2, text=6, dtype="float32"),
    "generate": dict(student=small, vision=small_vision, rows=3, text=6, new=6),
    "data": dict(images=6, side=56, rows=2_000),
}
QUICK["cache"] = QUICK["step"]


# -----------------------------------------------------------------------------
# Measuring

def take_turns(runs: dict, args: argparse.Namespace) -> dict[object, list[float]]:
    """Seconds of every run in every round. Each of them has run once already."""
    def now() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            began = now()
            run()
            seconds[name].append(now() - began)
    return seconds


def fastest(seconds: dict[object, list[float]]) -> object:
    return min(seconds, key=lambda name: statistics.median(seconds[name]), default=None)


def measure_memory(section: str, case: str, side: str, args: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of one run: "above" what was held before it, and in "total". Runs in a process of its own."""
    def resident(field: str) -> int:                                 # VmRSS: now, VmHWM: at its highest
        return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

    if section == "loss":
        CASES[section](case, side, QUICK[section], args)()           # what libraries allocate once does not count ...
    run = CASES[section](case, side, (QUICK if args.quick else REAL)[section], args)
    if section in ("step", "cache"):
        run()                                                        # ... nor does what an optimizer does
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        total = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")                # the high-water mark starts again from here
        before = resident("VmRSS")
        run()
        total = resident("VmHWM")
    return {"above": total - before, "total": total}


def peak_memory(section: str, case: str, side: str, args: argparse.Namespace) -> dict[str, int]:
    if args.quick:                                                   # means nothing then: save the start of a process
        return measure_memory(section, case, side, args)
    command = [sys.executable, __file__, section, f"--memory={case},{side}", f"--device={args.device}",
               f"--folder={args.folder}"]
    output = subprocess.run(command, env=os.environ | MEMORY_ENV, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


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
    def amount(values: list[float] | None) -> str:
        if values is None:
            return "not installed"
        middle = statistics.median(values)
        return f"{middle / 1e6:,.0f} MB" if row["unit"] == "B" else f"{middle:,.4g} {row['unit']}"

    peer = f"{amount(row['peer'])} ({row['against']})" if row["against"] else ""
    value = f"x {row['value']:.3g} ({min(row['each']):.3g} to {max(row['each']):.3g})" if row["peer"] else ""
    met = {True: "met", False: "**missed**", None: ""}[row["met"]]
    return f"| {row['case']} | {row['measure']} | {amount(row['ours'])} | {peer} | {value} | {row['target']} | {met} |"


def bare_products(layers: list[tuple], dtype: torch.dtype, device: str) -> tuple[Callable, float]:
    """The matrix products alone, on operands that are there already: as fast as this machine can. And their FLOPs.

    layers: (how many, tokens, inputs, outputs, passes) of linear layers; a pass is "f", the forward product, "x", the
    gradient of the inputs, or "w", that of the weight.
    """
    operands, flops = [], 0.0
    for count, tokens, n_in, n_out, passes in layers:
        shapes = [(tokens, n_in), (n_out, n_in), (tokens, n_out)]
        operands.append([count, passes] + [torch.randn(shape, dtype=dtype, device=device) for shape in shapes])
        flops += 2.0 * count * tokens * n_in * n_out * len(passes)

    def run() -> None:
        for count, passes, x, weight, grad in operands:
            for kind in passes * count:
                if kind == "f":
                    F.linear(x, weight)
                elif kind == "x":
                    grad @ weight
                else:
                    grad.T @ x
    return run, flops


# -----------------------------------------------------------------------------
# loss: from the last hidden states through heads of 151,936 rows to the loss, and back to the hidden states

def our_loss(what: str, hidden, weight, teacher_hidden, teacher_weight, targets) -> torch.Tensor:
    """The values of `plain_loss`, from chunked.chunked_loss as train.py uses it."""
    def chunk_loss(logits: torch.Tensor, part: slice) -> tuple:
        if what == "kl":
            with torch.no_grad():
                teacher_logits = F.linear(teacher_hidden[part], teacher_weight)
            each = losses.forward_kl(logits, teacher_logits)
        else:
            each = losses.cross_entropy(logits, targets[part])
        return each, [each]

    each, _ = chunked.chunked_loss(hidden, weight, chunk_loss)
    if what == "logp":
        with torch.no_grad():
            reference, _ = chunked.chunked_loss(teacher_hidden, teacher_weight, chunk_loss)
        each = each - reference
    return each


def plain_loss(what: str, hidden, weight, teacher_hidden, teacher_weight, targets) -> torch.Tensor:
    """The formulas of losses.py on full logits -> one value per token (N,). logp: the log-ratios of pd."""
    student_logits = F.linear(hidden, weight)                        # (N, V)
    if what == "ce":
        return losses.cross_entropy(student_logits, targets)
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight)    # (N, V)
    if what == "logp":
        return losses.cross_entropy(student_logits, targets) - losses.cross_entropy(teacher_logits, targets)
    return losses.forward_kl(student_logits, teacher_logits)


def loss_case(case: str, side: str, size: dict, args: argparse.Namespace) -> Callable:
    what, head = case.split()
    torch.manual_seed(0)
    draw = partial(torch.randn, device=args.device)
    N, V, D, Dt = size["tokens"], size["vocab"], size["student"], size["teacher"]
    # A trained student (d2d) keeps weights and residual stream in fp32, a frozen head (d2s, pd) stands in bf16.
    dtype = torch.float32 if head == "trained" else torch.bfloat16
    hidden, weight = draw(N, D).to(dtype).requires_grad_(), (draw(V, D) * 2 / D ** 0.5).to(dtype)
    weight.requires_grad_(head == "trained")
    teacher_hidden, teacher_weight = draw(N, Dt).bfloat16(), (draw(V, Dt) * 2 / Dt ** 0.5).bfloat16()
    targets = torch.randint(V, (N,), device=args.device)
    compute = our_loss if side == "ours" else plain_loss

    def run() -> list[torch.Tensor]:
        hidden.grad = weight.grad = None
        with torch.autocast(args.device, torch.bfloat16):
            each = compute(what, hidden, weight, teacher_hidden, teacher_weight, targets)
            (each.sum() / N).backward()
        return [each.detach(), hidden.grad] + [weight.grad] * weight.requires_grad
    return run


def bench_loss(size: dict, args: argparse.Namespace) -> Iterator[dict]:
    for case in ["kl frozen", "kl trained", "ce frozen", "ce trained", "logp frozen"]:
        runs = {side: loss_case(case, side, size, args) for side in ("ours", "plain")}
        off = largest_difference(runs["ours"](), runs["plain"]())
        yield row(case, "largest relative difference", "", off, target="<= 0.02")
        seconds = take_turns(runs, args)
        del runs
        yield row(case, "time", "s", seconds["ours"], seconds["plain"], "full logits", "<= 1.1")
        head = 4 * size["vocab"] * size["student"] if "trained" in case else 0       # its gradient has to be somewhere
        ours, plain = (peak_memory("loss", case, side, args)["above"] - head for side in ("ours", "plain"))
        yield row(case, "memory above inputs", "B", ours, plain, "full logits", "<= 0.1")


# -----------------------------------------------------------------------------
# moe: one sparse layer, forward and backward, beside the dense FFN and transformers' layer

def routed_tokens(n: int, router: torch.Tensor) -> torch.Tensor:
    """(2, n/2, D) tokens that prefer their experts clearly, every expert equally often; sets `router` (E, D) for it.

    transformers routes in bf16 under autocast, we in fp32. With close calls the two would compare different experts.
    """
    E, D = router.shape
    with torch.no_grad():
        router.copy_(torch.linalg.qr(torch.randn(D, E))[0].T)        # orthonormal rows
        logits = torch.rand(n, E).argsort(dim=1) * 0.5               # (n, E): 0, 0.5, 1, ... in random order
        x = torch.randn(n, D)
        return (x - x @ router.T @ router + logits @ router).view(2, -1, D)


def their_layer(ours: SparseFFN, width: int, ffn: int) -> nn.Module:
    """transformers' qwen2_moe layer as our checkpoints configure it, with our weights."""
    config = transformers.Qwen2MoeConfig(
        hidden_size=width, moe_intermediate_size=ffn, num_experts=len(ours.experts), num_experts_per_tok=ours.top_k,
        norm_topk_prob=ours.norm_topk, shared_expert_intermediate_size=0)
    layer = Qwen2MoeSparseMoeBlock(config)
    with torch.no_grad():
        layer.gate.weight.copy_(ours.router.weight)
        for e, expert in enumerate(ours.experts):
            layer.experts.gate_up_proj[e] = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            layer.experts.down_proj[e] = expert.down_proj.weight
        nn.init.zeros_(layer.shared_expert_gate.weight)
    return layer


def moe_runs(size: dict, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Callable]:
    """Every variant by name: "dense", and for each of three shapes "E4T1 ours", "E4T1 eager", "E4T1 grouped_mm"."""
    torch.manual_seed(0)
    n, D, ffn = size["tokens"], size["width"], size["n_ffn"]
    upstream = torch.randn(2, n // 2, D, device=args.device).to(dtype)

    def training(layer: nn.Module, x: torch.Tensor, grads: Callable, implementation: str = "") -> Callable:
        layer.to(args.device)                                        # weights stay fp32, as in training
        x = x.to(args.device, dtype).requires_grad_()

        def run() -> list[torch.Tensor]:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            if implementation:
                layer.experts.config._experts_implementation = implementation
            with torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = layer(x)
                y = y[0] if isinstance(y, tuple) else y              # ours returns its routing as well
            y.backward(upstream.to(y.dtype))
            return [y.detach(), x.grad, *grads(layer)]
        return run

    runs = {"dense": training(FFN(D, ffn), torch.randn(2, n // 2, D), lambda layer: [])}
    for E, A in [(4, 1), (4, 2), (16, 2)]:
        # Top 1 is not renormalised here: with it our router has a gradient and transformers' has none.
        layer = SparseFFN([FFN(D, ffn) for _ in range(E)], D, A, norm_topk=A > 1)
        x = routed_tokens(n, layer.router.weight)
        runs[f"E{E}T{A} ours"] = training(layer, x, lambda layer: [
            layer.router.weight.grad, *(expert.down_proj.weight.grad for expert in layer.experts)])
        if HAS_TRANSFORMERS:
            theirs = their_layer(layer, D, ffn)
            for implementation in EXPERTS:
                runs[f"E{E}T{A} {implementation}"] = training(
                    theirs, x, lambda layer: [layer.gate.weight.grad, *layer.experts.down_proj.grad], implementation)
    return runs


def bench_moe(size: dict, args: argparse.Namespace) -> Iterator[dict]:
    for dtype, kind, tolerance in [(torch.float32, "fp32", "<= 1e-4"), (torch.bfloat16, "bf16", "<= 0.03")]:
        runs = moe_runs(size, dtype, args)
        shapes, implementations = ["E4T1", "E4T2", "E16T2"], EXPERTS * HAS_TRANSFORMERS
        for shape in shapes:
            ours = runs[f"{shape} ours"]()
            for name in implementations:
                yield row(f"{shape} {kind}", f"largest relative difference, {name}", "",
                          largest_difference(ours, runs[f"{shape} {name}"]()), target=tolerance)
        del ours
        runs["dense"]()
        n, D, ffn = size["tokens"], size["width"], size["n_ffn"]
        runs["products"], flops = bare_products([(2, n, D, ffn, "fxw"), (1, n, ffn, D, "fxw")], dtype, args.device)
        runs["products"]()
        seconds = take_turns(runs, args)
        del runs
        yield row(f"dense {kind}", "bare matrix products", "GFLOP/s", [flops / s / 1e9 for s in seconds["products"]])
        yield row(f"dense {kind}", "time", "s", seconds["dense"], seconds["products"], "bare matrix products")
        for shape, peer, target in zip(shapes, ["dense", "dense", "E4T2 ours"], ["<= 1.15", "<= 2.2", "<= 1.15"]):
            ours = seconds[f"{shape} ours"]
            yield row(f"{shape} {kind}", "time", "s", ours, seconds[peer], peer, target)
            theirs = {name: seconds[f"{shape} {name}"] for name in implementations}
            best = fastest(theirs)
            yield row(f"{shape} {kind}", "time", "s", ours, theirs.get(best), f"transformers, {best}", "<= 1.0")


# -----------------------------------------------------------------------------
# step: a whole optimizer step of d2s and of pd, beside the same step written with transformers and full logits

def make_llava(text: DecoderConfig, vision: VisionConfig, seed: int, sparse: bool, device: str) -> Llava:
    """Random weights: torch's initialisation, with embeddings small enough for logits of ordinary size."""
    torch.manual_seed(seed)
    with torch.device(device):
        llava = Llava(LlavaConfig(vision, replace(text), IMAGE_ID, pad_token_id=0, eos_token_id=None, template=None))
    with torch.no_grad():
        llava.decoder.embedding.weight.mul_(0.05)
        if sparse:
            upcycle(llava, num_experts=4, top_k=2)
            for name, parameter in llava.named_parameters():         # equal experts would hide a wrong choice
                if ".experts." in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3 * parameter.std().item())
    return llava


def make_batch(size: dict, device: str) -> dict:
    """Rows of an image and a text. When training, all of the text is response."""
    torch.manual_seed(2)
    vision, rows = size["vision"], size["rows"]
    ids = torch.full((rows, vision.patches + size["text"]), IMAGE_ID)                    # (B, T)
    ids[:, vision.patches:] = torch.randint(1, IMAGE_ID, (rows, size["text"]))
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size)
    return {"input_ids": ids.to(device), "mask": (ids != IMAGE_ID).to(device), "pixel_values": pixels.to(device)}


def save_pair(size: dict, args: argparse.Namespace) -> None:
    """A dense teacher and a sparse student with the same ViT."""
    teacher = make_llava(size["teacher"], size["vision"], 0, False, args.device)
    student = make_llava(size["student"], size["vision"], 1, True, args.device)
    student.vision = teacher.vision
    for name, llava in [("teacher", teacher), ("student", student)]:
        llava.save_pretrained(Path(args.folder) / name, dtype=torch.bfloat16)


def our_step(stage: str, size: dict, args: argparse.Namespace, keep: int = 0) -> Callable:
    """The body of train.py's loop, from its own parts. keep: with so many of the teacher's log-probs in its place."""
    # The balance loss is computed and then weighs nothing: transformers' is another one (not per sequence).
    config = Config(train.DEFAULTS | dict(stage=stage, teacher="teacher", balance_coef=0.0))
    dtype = getattr(torch, size["dtype"])
    student = Llava.from_pretrained(f"{args.folder}/student", device=args.device)
    train.choose_trainable(student, config, dtype)
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    teacher = Llava.from_pretrained(f"{args.folder}/teacher", dtype, args.device).requires_grad_(False).eval()
    assert train.same_vision(student, teacher)
    teacher.vision = student.vision
    objective, optimizer = train.Objective(student, config), make_optimizer(weights)
    batch = make_batch(size, args.device)
    if stage == "pd":
        batch["pixel_values"] = batch["pixel_values"][::2]           # a pair shows the same image twice
    autocast = partial(torch.autocast, args.device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    vocabulary = student.config.decoder.vocab_size
    if keep:
        with autocast():
            kept, _ = train.teacher_targets(teacher, batch, Config(config, teacher_top_k=keep), vocabulary)
        batch, teacher = batch | kept, None

    def run() -> list[torch.Tensor]:
        total = train.count_batch([batch], student, config)
        with autocast():
            features = train.image_features(student, batch, stage)
            if keep:
                reference = train.cached_reference(batch, config, vocabulary)
            else:
                reference = train.teacher_reference(teacher, batch, features, config)
            loss, _ = objective(batch, features, reference, total)
            loss.backward()
        return finish_step(loss, weights, optimizer, student.adaptor.linear_2.weight)
    return run


def their_step(stage: str, size: dict, args: argparse.Namespace) -> Callable:
    """The same step as textbooks and TRL have it, with logits of every position -> run(way to run the experts)."""
    dtype, load = getattr(torch, size["dtype"]), transformers.LlavaForConditionalGeneration.from_pretrained
    student = load(f"{args.folder}/student", dtype=torch.float32).to(args.device).train()
    for name, parameter in student.named_parameters():
        parameter.requires_grad = any(part in name for part in ("multi_modal_projector", ".mlp.experts.", ".mlp.gate."))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    teacher = load(f"{args.folder}/teacher", dtype=dtype).to(args.device).requires_grad_(False).eval()
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer, batch = make_optimizer(weights), make_batch(size, args.device)
    pixels = batch["pixel_values"] if stage == "d2s" else batch["pixel_values"][::2].repeat(2, 1, 1, 1)
    inputs = dict(input_ids=batch["input_ids"], pixel_values=pixels, attention_mask=torch.ones_like(batch["input_ids"]))
    targets, mask = batch["input_ids"][:, 1:].flatten(), batch["mask"][:, 1:]            # (B (T-1)), (B, T-1)

    def run(implementation: str) -> list[torch.Tensor]:
        student.set_experts_implementation({"text_config": implementation})
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = student(**inputs).logits[:, :-1].flatten(0, 1)                      # (B (T-1), V)
            with torch.no_grad():
                teacher_logits = teacher(**inputs).logits[:, :-1].flatten(0, 1)
            if stage == "d2s":
                each = losses.forward_kl(logits, teacher_logits) + losses.cross_entropy(logits, targets)
                loss = (each * mask.flatten()).sum() / mask.sum()
            else:
                sums = [(-losses.cross_entropy(each, targets).view(mask.shape) * mask).sum(1)
                        for each in (logits, teacher_logits)]                            # (B,) twice
                loss = losses.preference(*sums[0].chunk(2), *sums[1].chunk(2)).mean()
            loss.backward()
        return finish_step(loss, weights, optimizer, student.model.multi_modal_projector.linear_2.weight)
    return run


def make_optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """train.py's, at learning rate 0: the same work, and every run starts from the same weights."""
    return torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)


def finish_step(loss: torch.Tensor, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer,
                watched: nn.Parameter) -> list[torch.Tensor]:
    norm, grad = nn.utils.clip_grad_norm_(weights, float("inf")), watched.grad
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [loss.detach(), norm, grad]


def step_case(case: str, side: str, size: dict, args: argparse.Namespace) -> Callable:
    return our_step(case, size, args) if side == "ours" else partial(their_step(case, size, args), side)


def weight_products(llava: Llava, batch: plan.Batch) -> list[tuple]:
    """Every product with a weight of a pass, and of its backward where weights learn, as `bare_products` takes them.

    Without the routers' few. Attention's own products are left out, too.
    """
    layers, upstream = Counter(), False                              # does anything before this matrix learn?
    for name, _, p, vectors in plan.products(llava, batch):
        if vectors and ".router." not in name:
            layers[int(vectors), p[0].numel(), len(p), "f" + "x" * upstream + "w" * p.requires_grad] += 1
        upstream = upstream or p.requires_grad
    return [(count, *layer) for layer, count in layers.items()]


def describe_step(stage: str, size: dict, args: argparse.Namespace) -> tuple[list[tuple], float]:
    """The products of a step of ours, and the bytes of both models' weights, the gradients and Adam's averages: what the
    step must hold however it is done."""
    config = Config(train.DEFAULTS | dict(stage=stage, student=f"{args.folder}/student", teacher=f"{args.folder}/teacher",
                                          dtype=size["dtype"]))
    student, teacher = plan.build(config)
    items = size["rows"] // 2 if stage == "pd" else size["rows"]
    batch = plan.Batch.of(config, items, size["vision"].patches + size["text"], size["text"])
    memory = plan.memory(student, teacher, config, 1, batch)
    held = sum(memory[name] for name in ("weights that learn, fp32", "frozen weights", "teacher", "gradients, fp32",
                                         "Adam's averages, fp32"))
    return weight_products(student, batch) + weight_products(teacher, batch._replace(images=0)), held    # one ViT for both


def bench_step(size: dict, args: argparse.Namespace) -> Iterator[dict]:
    dtype = getattr(torch, size["dtype"])
    with tempfile.TemporaryDirectory() as args.folder:
        save_pair(size, args)
        for stage, faster, smaller, share in [("d2s", ">= 2.2", "<= 0.5", ">= 0.6"), ("pd", "", "", "")]:
            implementations = EXPERTS * HAS_TRANSFORMERS
            runs = {"ours": our_step(stage, size, args)}
            if HAS_TRANSFORMERS:
                theirs = their_step(stage, size, args)
                runs |= {side: partial(theirs, side) for side in implementations}
                del theirs
            results = {side: run() for side, run in runs.items()}
            for side in implementations:
                yield row(stage, f"largest relative difference, {side}", "",
                          largest_difference(results["ours"], results[side]), target="<= 0.05")
            layers, held = describe_step(stage, size, args)
            runs["products"], flops = bare_products(layers, dtype, args.device)
            runs["products"]()
            seconds = take_turns(runs, args)
            del runs, results
            best = fastest({side: seconds[side] for side in implementations})
            rate = {side: [size["rows"] / s for s in each] for side, each in seconds.items()}
            yield row(stage, "speed", "rows/s", rate["ours"], rate.get(best), f"transformers, {best}", faster)
            gflops = {side: [flops / s / 1e9 for s in each] for side, each in seconds.items()}
            yield row(stage, "speed", "GFLOP/s", gflops["ours"], gflops["products"], "bare matrix products", share)
            memory = {side: peak_memory("step", stage, side, args) for side in ("ours", best) if side}
            for what, name in [("total", "memory, all included"), ("above", "memory above weights and optimizer")]:
                yield row(stage, name, "B", memory["ours"][what], memory[best][what] if best else None,
                          f"transformers, {best}", smaller)
            yield row(stage, "weights, gradients and Adam, counted", "B", held,
                      memory[best]["total"] if best else None, f"transformers, {best}")


# -----------------------------------------------------------------------------
# generate: greedy answers to an image and a prompt, beside transformers' generate

def bench_generate(size: dict, args: argparse.Namespace) -> Iterator[dict]:
    batch, new = make_batch(size, args.device), size["new"]
    ids = batch["input_ids"]
    for sparse in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            llava = make_llava(size["student"], size["vision"], 0, sparse, args.device)
            llava.save_pretrained(folder, dtype=torch.bfloat16)
            del llava
            for dtype, kind in [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]:
                case = f"{'E4T2' if sparse else 'dense'} {kind}, {ids.shape[0]} x ({ids.shape[1]} + {new})"
                yield from compare_generation(case, folder, dtype, ids, batch["pixel_values"].to(dtype), new, args)


def prompt_products(llava: Llava, ids: torch.Tensor) -> list[tuple]:
    rows, tokens = ids.shape
    return weight_products(llava, plan.Batch(rows, tokens, learned=rows, images=rows))       # the head at the last of them


def compare_generation(case: str, folder: str, dtype: torch.dtype, ids: torch.Tensor, pixels: torch.Tensor, new: int,
                       args: argparse.Namespace) -> Iterator[dict]:
    ours = Llava.from_pretrained(folder, dtype, args.device).requires_grad_(False).eval()
    runs = {("ours", n): partial(ours.generate, ids, pixels, max_new_tokens=n) for n in (1, new)}
    answer = runs["ours", new]()                                     # (B, new)
    implementations = (EXPERTS if ours.config.decoder.num_experts else ["eager"]) * HAS_TRANSFORMERS
    if HAS_TRANSFORMERS:
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(args.device).eval()

        def generate(implementation: str, n: int) -> torch.Tensor:
            theirs.set_experts_implementation({"text_config": implementation})
            return theirs.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
                                   max_new_tokens=n, do_sample=False)[:, ids.shape[1]:]

        runs |= {(side, n): partial(generate, side, n) for side in implementations for n in (1, new)}
        same = min((answer == runs[side, new]()).float().mean().item() for side in implementations)
        yield row(case, "tokens equal to transformers'", "", same, target=">= 1" if dtype == torch.float32 else "")
        # In bf16 a near-tie may fall either way, and then the rest of its row differs. So show transformers our answer:
        # how far is any of our tokens from what it would have said at that place?
        with torch.no_grad():
            logits = theirs(input_ids=torch.cat([ids, answer], 1), pixel_values=pixels, logits_to_keep=new + 1).logits
        logits = logits[:, :-1].float()                              # (B, new, V)
        behind = (logits.amax(-1) - logits.gather(-1, answer[..., None])[..., 0]) / logits.std(-1)
        yield row(case, "our tokens' logits below transformers' best", "std", behind.max().item(), target="<= 0.1")

    products, _ = bare_products(prompt_products(ours, ids), dtype, args.device)
    products()
    seconds = take_turns(runs | {"products": products}, args)
    best, B = fastest({side: seconds[side, new] for side in implementations}), len(ids)
    speeds = {
        "tokens per second": lambda side: [B * new / s for s in seconds[side, new]],
        "prompt and first token": lambda side: [B / s for s in seconds[side, 1]],
        "further tokens": lambda side: [B * (new - 1) / (b - a) for a, b in zip(seconds[side, 1], seconds[side, new])],
    }
    for measure, of in speeds.items():
        yield row(case, measure, "/s", of("ours"), of(best) if best else None, f"transformers, {best}",
                  ">= 2" if measure == "tokens per second" else "")
    yield row(case, "prompt and first token", "/s", speeds["prompt and first token"]("ours"),
              [B / s for s in seconds["products"]], "bare matrix products")


# -----------------------------------------------------------------------------
# data: pixels, padding

def bench_data(size: dict, args: argparse.Namespace) -> Iterator[dict]:
    yield from compare_pixels(size, args)
    yield from measure_padding(size)


def compare_pixels(size: dict, args: argparse.Namespace) -> Iterator[dict]:
    rng, side, name = np.random.default_rng(0), size["side"], "transformers"
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jpg" for i in range(size["images"])]
        for i, path in enumerate(paths):                             # smooth colours with a little noise: photo-like
            width, height = [(640, 480), (480, 640), (640, 427), (500, 375)][i % 4]
            coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(path, quality=90)
        images = [data.load_image(path) for path in paths]

        def ours(images: Iterator[Image.Image]) -> torch.Tensor:
            return torch.stack([data.transform_image(image, side) for image in images])

        runs = {("ours", "PIL"): lambda: ours(images), ("ours", "JPEG"): lambda: ours(map(data.load_image, paths))}
        if HAS_TRANSFORMERS:                                         # its fast path needs torchvision
            name = "LlavaImageProcessor" + ("" if importlib.util.find_spec("torchvision") else "Pil")
            process = getattr(transformers, name)(do_pad=True, size={"shortest_edge": side},
                                                  crop_size={"height": side, "width": side})

            def theirs(images: list[Image.Image]) -> torch.Tensor:
                return process(images=images, return_tensors="pt").pixel_values

            runs |= {("theirs", "PIL"): lambda: theirs(images),
                     ("theirs", "JPEG"): lambda: theirs([Image.open(path) for path in paths])}
            std = torch.tensor(data.CLIP_STD)[:, None, None]
            off = [(runs["ours", kind]() - runs["theirs", kind]()) * std for kind in ("PIL", "JPEG")]
            yield row("pixels", "largest difference, of 255", "", 255 * torch.stack(off).abs().max(), target="<= 1")
        rates = {key: [len(paths) / s for s in seconds] for key, seconds in take_turns(runs, args).items()}
    for kind in ("PIL", "JPEG"):
        yield row(f"pixels from {kind}", "images per second", "/s", rates["ours", kind], rates.get(("theirs", kind)),
                  name, ">= 1")


def measure_padding(size: dict) -> Iterator[dict]:
    """
    The share of padding in our micro-batches, at 128 rows a step on 16 ranks.

    The mix: nine rows in ten have an image, 576 positions, and a text of log-normal length, median 100 (sigma 0.9); the
    tenth is text alone, median 300 (sigma 1); all cut at 2,048.
    """
    rng, n = np.random.default_rng(0), size["rows"]
    has_image = rng.random(n) < 0.9
    text = np.where(has_image, rng.lognormal(np.log(100), 0.9, n), rng.lognormal(np.log(300), 1.0, n))
    lengths = np.minimum(576 * has_image + text.astype(int) + 1, 2048)
    sampler = data.Sampler(lengths.tolist(), batch_size=128)
    for micro in (2, 4, 8):
        share = {}
        for order in ("sampler", "random"):
            parts = [part for step in range(min(200, sampler.steps_per_epoch)) for rank in range(16)
                     for part in data.micro_batches(sampler.batch(step) if order == "sampler" else
                                                    rng.choice(n, 128).tolist(), micro, rank, 16)]
            padded = sum(len(part) * lengths[part].max() for part in parts)
            share[order] = 1 - sum(lengths[part].sum() for part in parts) / padded
        yield row(f"micro-batch {micro}", "padding, of all tokens", "", share["sampler"], target="<= 0.05")
        yield row(f"micro-batch {micro}", "padding with rows in random order", "", share["random"])


# -----------------------------------------------------------------------------
# cache: a d2s step with the teacher's kept answers, and what is lost by keeping k of them

def bench_cache(size: dict, args: argparse.Namespace) -> Iterator[dict]:
    dtype = getattr(torch, size["dtype"])
    with tempfile.TemporaryDirectory() as args.folder:
        save_pair(size, args)
        online, cached = our_step("d2s", size, args), our_step("d2s", size, args, keep=64)
        online(), cached()
        seconds = take_turns({"online": online, "cached": cached}, args)
        del online, cached
        case, against = f"d2s step, {size['dtype']}", "with the teacher"
        yield row(case, "time", "s", seconds["cached"], seconds["online"], against, "<= 0.6")
        ours, theirs = (peak_memory("cache", "d2s", side, args)["total"] for side in ("cached", "online"))
        yield row(case, "memory, all included", "B", ours, theirs, against)
    yield from loss_gap(dtype, args)


def cache_case(case: str, side: str, size: dict, args: argparse.Namespace) -> Callable:
    return our_step(case, size, args, keep=64 if side == "cached" else 0)


def loss_gap(dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict]:
    """The KL on the tiny world's d2d rows, over all tokens and over k of them, before (align) and after d2d."""
    if not Path("out/tiny/d2d/config.json").is_file():
        print("(no out/tiny here: run speedrun.sh first for what k costs)")
        return
    config = Config(train.DEFAULTS | dict(stage="d2d", teacher="out/tiny/teacher", data="data/tiny/train/d2d.json",
                                          image_dir="data/tiny/train/images", max_length=128, dtype="float32"))
    teacher = Llava.from_pretrained(config.teacher).eval()
    for name in ("align", "d2d"):
        student = Llava.from_pretrained(f"out/tiny/{name}").eval()
        V, rows = student.config.decoder.vocab_size, train.open_rows(config, student)
        batches = data.prefetch(rows, [range(i, i + 50) for i in range(0, 500, 50)],
                                partial(data.collate, pad_token_id=student.config.pad_token_id), 0)
        kl, tokens = {"online": 0.0, V: 0.0, 64: 0.0, 16: 0.0, 4: 0.0}, 0
        for batch in batches:
            with torch.no_grad():
                features = train.image_features(student, batch, "d2d")
                hidden, _, _ = train.response_states(student, batch, features, config)
                logits, everything, tokens = student.decoder.head(hidden), slice(0, len(hidden)), tokens + len(hidden)
                for k in kl:
                    if k == "online":
                        of_teacher = train.teacher_reference(teacher, batch, features, config)
                    else:
                        kept, _ = train.teacher_targets(teacher, batch, Config(config, teacher_top_k=k), V)
                        of_teacher = train.cached_reference(batch | kept, config, V)
                    kl[k] += of_teacher(logits, everything).sum().item()
        for k in [k for k in kl if k != "online"]:
            case = f"tiny world, student after {name}, k = {k}" + " = V" * (k == V)
            yield row(case, "KL per token", "", kl[k] / tokens, kl["online"] / tokens, "online")
            yield row(case, "KL missing", "", (kl["online"] - kl[k]) / tokens, target="<= 1e-5" if k == V else "")
            yield row(case, "size per token", "bytes", 8.0 * k + 4)


# -----------------------------------------------------------------------------

# What is measured in a process of its own
CASES = {"loss": loss_case, "step": step_case, "cache": cache_case}
SECTIONS = {"loss": bench_loss, "moe": bench_moe, "step": bench_step, "generate": bench_generate, "data": bench_data,
            "cache": bench_cache}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Speed and memory beside what a user would otherwise run.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of every timing")
    parser.add_argument("--quick", action="store_true", help="toy sizes: do both sides agree?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--memory", help=argparse.SUPPRESS)          # "case,side": how this script calls itself
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if args.memory:
        case, side = args.memory.rsplit(",", 1)
        print(json.dumps(measure_memory(args.sections[0], case, side, args)))
        return

    packages = ["torch", "numpy", "pillow"] + ["transformers"] * HAS_TRANSFORMERS
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    info = Path("/proc/cpuinfo")
    cpu = info.read_text().partition("model name\t: ")[2].partition("\n")[0] if info.exists() else platform.machine()
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": args.device,
               "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "none"}
    report = {"machine": machine, "versions": versions, "memory_env": MEMORY_ENV, "repeats": args.repeats,
              "quick": args.quick, "sections": {}}
    print(", ".join(f"{key} {value}" for key, value in (machine | versions).items()))
    for section in args.sections or SECTIONS:
        print(f"\n## {section}\n\n| case | measure | ours | peer | ours / peer | target | |\n" + "|---" * 7 + "|")
        rows = report["sections"][section] = []
        for each in SECTIONS[section]((QUICK if args.quick else REAL)[section], args):
            rows.append(each)
            print(show(each), flush=True)
        write_file(Path(args.out), json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
