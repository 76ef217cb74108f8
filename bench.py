"""
Speed and memory of this code beside what a user would otherwise run, as ratios from one and the same run.

    python bench.py                                  all sections, in about an hour on two cores
    python bench.py loss moe --repeats=3             some of them: loss, moe, step, generate, data
    OMP_NUM_THREADS=1 python bench.py step --quick   toy sizes; only whether both sides agree means anything there

A second on this machine says nothing about yours, a ratio says a little more. So every number here is ours next to a
peer's: transformers running the same checkpoint, the textbook formula on full logits, the dense FFN, the bare matrix
products. Widths and vocabulary are real (Qwen2-0.5B, Qwen1.5-1.8B, CLIP-L, 151,936 tokens), layers are few and weights
random. Each section first shows that both sides compute the same thing, then how long they take and how much they need.

- Time: after one run to warm up, the sides take turns (A B C A B C ...), so that a slow minute of the machine hits all
  of them. A ratio is taken within each round; printed is the median over the rounds, with the smallest and largest.
- Memory: one side in a process of its own, its peak over what it held before. On a CPU that is the resident set, with
  glibc told to give every large block back at once (`MEMORY_ENV`), so that it is the memory in use and not malloc's hoard;
  on a GPU it is torch.cuda.max_memory_allocated.

A table per section goes to the screen, every raw number to bench.json. A missed target is printed like a met one.
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
from collections.abc import Callable
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
from model import DECODERS, FFN, DecoderConfig, Llava, LlavaConfig, VisionConfig, write_file
from moe import SparseFFN, upcycle

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if HAS_TRANSFORMERS:
    import transformers
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
    transformers.utils.logging.disable_progress_bar()

MEMORY_ENV = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
EXPERTS = ["eager", "grouped_mm"]     # transformers' ways to run experts; its fastest counts (batched_mm copies weights per token)
IMAGE_ID = 151646

student, teacher = DECODERS["Qwen/Qwen2-0.5B"], DECODERS["Qwen/Qwen1.5-1.8B"]
REAL = {
    "loss": dict(tokens=1024, vocab=151936, student=896, teacher=3584),
    "moe": dict(tokens=2048, width=896, ffn=4864),
    "step": dict(student=replace(student, n_layer=8), teacher=replace(teacher, n_layer=8), vision=VisionConfig(n_layer=4),
                 rows=2, response=128, dtype="bfloat16"),
    "generate": dict(student=replace(student, n_layer=4), vision=VisionConfig(n_layer=2), rows=16, text=32, new=64),
    "data": dict(images=64, side=336, rows=50_000),
}
small = DecoderConfig(vocab_size=IMAGE_ID + 10, n_embd=32, n_layer=2, n_head=4, n_kv_head=2, ffn=48, tied=True)
tiny_vision = VisionConfig(image_size=28, n_embd=32, n_layer=2, n_head=4, ffn=64)
QUICK = {
    "loss": dict(tokens=24, vocab=515, student=16, teacher=32),
    "moe": dict(tokens=48, width=32, ffn=64),
    "step": dict(student=small, teacher=replace(small, n_embd=48, ffn=64, tied=False), vision=tiny_vision, rows=2,
                 response=6, dtype="float32"),
    "generate": dict(student=small, vision=tiny_vision, rows=3, text=5, new=6),
    "data": dict(images=6, side=56, rows=2_000),
}


# -----------------------------------------------------------------------------
# Measuring

def take_turns(runs: dict[str, Callable], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every run in every round. Whoever calls this has run each of them once already."""
    seconds = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            synchronize(args.device)
            began = time.perf_counter()
            run()
            synchronize(args.device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024


def measure_memory(section: str, case: str, side: str, args: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of one run: `above` what was held before it, and in `total`. This runs in a process of its own."""
    CASES[section](case, side, QUICK[section], args)()               # what libraries allocate once does not count ...
    run = CASES[section](case, side, (QUICK if args.quick else REAL)[section], args)
    if section == "step":
        run()                                                        # ... nor does the optimizer's state
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
    if args.quick:                                                   # toy sizes mean nothing; save the start of a process
        return measure_memory(section, case, side, args)
    command = [sys.executable, __file__, section, f"--memory={case},{side}", f"--device={args.device}",
               f"--folder={args.folder}"] + ["--quick"] * args.quick
    result = subprocess.run(command, env=os.environ | MEMORY_ENV, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def largest_difference(ours: dict, theirs: dict) -> float:
    """Over all results that both sides return (tensors, or lists of them), each relative to its largest entry."""
    worst = 0.0
    for name in ours.keys() & theirs.keys():
        pairs = [(ours[name], theirs[name])] if isinstance(ours[name], torch.Tensor) else zip(ours[name], theirs[name])
        for a, b in pairs:
            worst = max(worst, ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-12)).item())
    return worst


def cost(case: str, measure: str, ours: list[float], peer: list[float] | None, against: str, target: str = "",
         unit: str = "s") -> dict:
    """A row of a table: how many times the peer's seconds or bytes we take."""
    row = {"case": case, "measure": measure, "against": against, "unit": unit, "ours": ours, "peer": peer, "target": target}
    each = [a / b for a, b in zip(ours, peer or [])]
    return row | {"ratios": each, "value": statistics.median(each) if each else None}


def speed(case: str, measure: str, ours: list[float], peer: list[float] | None, against: str, target: str = "") -> dict:
    """A row of a table: how many times as fast as the peer we are. `ours` and `peer` are seconds here too."""
    row = cost(case, measure, ours, peer, against, target)
    each = [1 / ratio for ratio in row["ratios"]]
    return row | {"ratios": each, "value": statistics.median(each) if each else None}


def figure(case: str, measure: str, value: float, target: str = "", unit: str = "") -> dict:
    """A row with one number, judged by itself."""
    return {"case": case, "measure": measure, "unit": unit, "target": target, "value": float(value)}


def is_met(row: dict) -> bool | None:
    if not row["target"] or row["value"] is None:
        return None
    relation, bound = row["target"].split()
    return row["value"] <= float(bound) if relation == "<=" else row["value"] >= float(bound)


def print_table(title: str, rows: list[dict]) -> None:
    def amount(values, unit):
        middle = statistics.median(values)
        return f"{middle / 1e6:,.0f} MB" if unit == "B" else f"{middle:.4g} {unit}"

    print(f"\n## {title}\n\n| case | measure | ours | peer | value | target | |\n|---|---|---|---|---|---|---|")
    for row in rows:
        ours = peer = ""
        value = "peer not installed" if row["value"] is None else f"{row['value']:.3g} {row['unit']}"
        if row.get("peer"):
            ours, peer = amount(row["ours"], row["unit"]), f"{amount(row['peer'], row['unit'])} ({row['against']})"
            value = f"x {row['value']:.3g} ({min(row['ratios']):.3g} to {max(row['ratios']):.3g})"
        met = {True: "met", False: "**missed**", None: ""}[is_met(row)]
        print(f"| {row['case']} | {row['measure']} | {ours} | {peer} | {value} | {row['target']} | {met} |", flush=True)


def bare_products(layers: list[tuple], dtype: torch.dtype, device: str) -> tuple[Callable, float]:
    """The matrix products alone, on operands that are there already: how fast this machine could be. With their FLOPs.

    layers: (how many, tokens, inputs, outputs, passes) of linear layers; a pass is "f", the forward product, "x", the
    gradient of the inputs, or "w", that of the weight.
    """
    operands, flops = [], 0.0
    for count, tokens, n_in, n_out, passes in layers:
        x, weight, grad = (torch.randn(shape, dtype=dtype, device=device) for shape in
                           [(tokens, n_in), (n_out, n_in), (tokens, n_out)])
        operands.append((count, x, weight, grad, passes))
        flops += 2.0 * count * tokens * n_in * n_out * len(passes)

    def run() -> dict:
        for count, x, weight, grad, passes in operands:
            for _ in range(count):
                if "f" in passes:
                    F.linear(x, weight)
                if "x" in passes:
                    grad @ weight
                if "w" in passes:
                    grad.T @ x
        return {}

    return run, flops


# -----------------------------------------------------------------------------
# loss: from the last hidden states to the gradient of the hidden states, through heads of 151,936 rows

def our_loss(what: str, hidden, weight, teacher_hidden, teacher_weight, targets) -> torch.Tensor:
    """The same values from losses.by_chunks, used as train.py uses it."""
    def of_some_tokens(logits: torch.Tensor, part: slice) -> tuple:
        each = torch.zeros(len(logits), device=logits.device)
        if "kl" in what:
            with torch.no_grad():
                teacher_logits = F.linear(teacher_hidden[part], teacher_weight)
            each = losses.forward_kl(logits, teacher_logits)
        if what != "kl":
            each = each + losses.cross_entropy(logits, targets[part])
        return each, [each]

    each, _ = losses.by_chunks(hidden, weight, of_some_tokens)
    if what == "logp":
        with torch.no_grad():
            reference, _ = losses.by_chunks(teacher_hidden, teacher_weight, of_some_tokens)
        each = each - reference                                      # the log-ratio, negated
    return each


def plain_loss(what: str, hidden, weight, teacher_hidden, teacher_weight, targets) -> torch.Tensor:
    """The formulas of losses.py on full logits: one value per token (N,), for logp two."""
    student_logits = F.linear(hidden, weight)                        # (N, V)
    if what == "ce":
        return losses.cross_entropy(student_logits, targets)
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight)    # (N, V)
    if what == "kl":
        return losses.forward_kl(student_logits, teacher_logits)
    if what == "kl+ce":
        return losses.forward_kl(student_logits, teacher_logits) + losses.cross_entropy(student_logits, targets)
    return losses.cross_entropy(student_logits, targets) - losses.cross_entropy(teacher_logits, targets)   # log-ratios


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

    def run() -> dict:
        hidden.grad = weight.grad = None
        with torch.autocast(args.device, torch.bfloat16):
            each = compute(what, hidden, weight, teacher_hidden, teacher_weight, targets)
            each.sum().div(N).backward()
        return {"loss": each.detach(), "hidden": hidden.grad} | ({"head": weight.grad} if head == "trained" else {})

    run.head_grad = weight.numel() * 4 if head == "trained" else 0
    return run


def bench_loss(size: dict, args: argparse.Namespace) -> list[dict]:
    rows = []
    for case in ["kl frozen", "kl trained", "kl+ce frozen", "ce frozen", "ce trained", "logp frozen", "logp trained"]:
        runs = {side: loss_case(case, side, size, args) for side in ("ours", "plain")}
        rows.append(figure(case, "largest relative difference", largest_difference(runs["ours"](), runs["plain"]()),
                           "<= 0.02"))
        seconds = take_turns(runs, args)
        rows.append(cost(case, "time", seconds["ours"], seconds["plain"], "full logits", "<= 1.1"))
        own = runs["ours"].head_grad
        del runs
        ours, plain = (peak_memory("loss", case, side, args)["above"] - own for side in ("ours", "plain"))
        rows.append(cost(case, "memory above inputs", [ours], [plain], "full logits", "<= 0.1", "B"))
    return rows


# -----------------------------------------------------------------------------
# moe: one sparse layer, forward and backward, against the dense FFN and transformers' layer

def our_moe(n_expert: int, top_k: int, size: dict) -> tuple[nn.Module, dict[str, Callable]]:
    """A sparse layer and, by name, how to read weights that transformers' layer has as well."""
    # Top 1 without renormalising: with it our router has a gradient, and transformers' has none.
    layer = SparseFFN([FFN(size["width"], size["ffn"]) for _ in range(n_expert)], size["width"], top_k, top_k > 1)
    return layer, {"router": lambda: [layer.router.weight],
                   "up": lambda: [expert.up_proj.weight for expert in layer.experts],
                   "gate": lambda: [expert.gate_proj.weight for expert in layer.experts],
                   "down": lambda: [expert.down_proj.weight for expert in layer.experts]}


def their_moe(n_expert: int, top_k: int, size: dict, ours: dict[str, Callable]) -> tuple[nn.Module, dict[str, Callable]]:
    """transformers' qwen2_moe layer, as our checkpoints configure it, with our weights."""
    config = transformers.Qwen2MoeConfig(
        hidden_size=size["width"], moe_intermediate_size=size["ffn"], num_experts=n_expert, num_experts_per_tok=top_k,
        norm_topk_prob=top_k > 1, shared_expert_intermediate_size=0)
    block = qwen2_moe.Qwen2MoeSparseMoeBlock(config).to(ours["router"]()[0].device)
    with torch.no_grad():
        block.gate.weight.copy_(ours["router"]()[0])
        block.experts.gate_up_proj.copy_(torch.stack([torch.cat(pair) for pair in zip(ours["gate"](), ours["up"]())]))
        block.experts.down_proj.copy_(torch.stack(ours["down"]()))
        nn.init.zeros_(block.shared_expert_gate.weight)
    return block, {"router": lambda: [block.gate.weight], "down": lambda: [block.experts.down_proj]}


def routed_tokens(size: dict, router: torch.Tensor) -> torch.Tensor:
    """(2, N/2, D) tokens that prefer their experts clearly, and each expert equally often.

    transformers routes in bf16 under autocast, we in fp32. With close calls the two would compare different experts.
    """
    E, D = router.shape
    router.copy_(torch.linalg.qr(torch.randn(D, E))[0].T)            # orthonormal rows
    wanted = torch.rand(size["tokens"], E).argsort(dim=1) * 0.5      # (N, E) logits: 0, 0.5, 1, ... in random order
    x = torch.randn(size["tokens"], D)
    return (x - x @ router.T @ router + wanted.to(router) @ router).view(2, -1, D)


def moe_runs(dtype: torch.dtype, size: dict, args: argparse.Namespace) -> dict[str, Callable]:
    """Every variant by name: "dense", and for each of three shapes "E4T1 ours", "E4T1 eager", "E4T1 grouped_mm"."""
    torch.manual_seed(0)
    D, half = size["width"], size["tokens"] // 2
    upstream = torch.randn(2, half, D, device=args.device).to(dtype)

    def training(module: nn.Module, x: torch.Tensor, weights: dict[str, Callable], implementation: str = "") -> Callable:
        x = x.detach().to(args.device, dtype).requires_grad_()

        def run() -> dict:
            x.grad = None
            module.zero_grad(set_to_none=True)
            if implementation:
                module.experts.config._experts_implementation = implementation
            with torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = module(x)
                y = y[0] if isinstance(y, tuple) else y
            y.backward(upstream.to(y.dtype))
            grads = {name: [w.grad for w in read()] for name, read in weights.items()}
            return {"y": y.detach(), "x": x.grad, "router": grads.get("router", []),
                    "down": [g for grad in grads.get("down", []) for g in grad.reshape(-1, D, size["ffn"])]}
        return run

    dense = FFN(D, size["ffn"]).to(args.device)
    runs = {"dense": training(dense, torch.randn(2, half, D), {})}
    for n_expert, top_k in [(4, 1), (4, 2), (16, 2)]:
        layer, weights = our_moe(n_expert, top_k, size)
        with torch.no_grad():
            x = routed_tokens(size, weights["router"]()[0])
        layer.to(args.device)
        runs[f"E{n_expert}T{top_k} ours"] = training(layer, x, weights)
        if HAS_TRANSFORMERS:
            block, theirs = their_moe(n_expert, top_k, size, weights)
            for implementation in EXPERTS:
                runs[f"E{n_expert}T{top_k} {implementation}"] = training(block, x, theirs, implementation)
    products = [(2, size["tokens"], D, size["ffn"], "fxw"), (1, size["tokens"], size["ffn"], D, "fxw")]
    runs["products"], runs["products"].flops = bare_products(products, dtype, args.device)
    return runs


def bench_moe(size: dict, args: argparse.Namespace) -> list[dict]:
    rows = []
    for dtype, kind, tolerance in [(torch.float32, "fp32", "<= 1e-4"), (torch.bfloat16, "bf16", "<= 0.03")]:
        runs = moe_runs(dtype, size, args)
        for name, run in runs.items():
            result = run()
            if name.endswith("ours"):
                ours = result
            elif name[0] == "E":
                rows.append(figure(f"{name.split()[0]} {kind}", f"largest relative difference, {name.split()[1]}",
                                   largest_difference(ours, result), tolerance))
        del ours, result
        seconds = take_turns(runs, args)
        rows.append(figure(f"dense {kind}", "speed of the bare matrix products",
                           runs["products"].flops / statistics.median(seconds["products"]) / 1e9, unit="GFLOP/s"))
        rows.append(cost(f"dense {kind}", "time", seconds["dense"], seconds["products"], "bare products"))
        for shape, peer, target in [("E4T1", "dense", "<= 1.15"), ("E4T2", "dense", "<= 2.2"), ("E16T2", "E4T2 ours", "<= 1.15")]:
            rows.append(cost(f"{shape} {kind}", "time", seconds[f"{shape} ours"], seconds[peer], peer, target))
            theirs = {name: seconds[f"{shape} {name}"] for name in EXPERTS if HAS_TRANSFORMERS}
            fastest = min(theirs, key=lambda name: statistics.median(theirs[name]), default=None)
            rows.append(cost(f"{shape} {kind}", "time", seconds[f"{shape} ours"], theirs.get(fastest),
                             f"transformers, {fastest}", "<= 1.0"))
    return rows


# -----------------------------------------------------------------------------
# step: a whole optimizer step of d2s and of pd, against the same step written with transformers and full logits

def make_llava(text: DecoderConfig, vision: VisionConfig, seed: int, device: str, vision_weights: dict | None = None) -> Llava:
    """Random weights: torch's initialisation, and embeddings small enough for logits of ordinary size."""
    torch.manual_seed(seed)
    with torch.device(device):
        llava = Llava(LlavaConfig(vision, replace(text), IMAGE_ID, pad_token_id=0, eos_token_id=None, template=None))
    with torch.no_grad():
        llava.decoder.embedding.weight.mul_(0.05)
        if vision_weights:
            llava.vision.load_state_dict(vision_weights)
    return llava


def make_sparse(llava: Llava) -> None:
    """Upcycle to E4T2, then let the experts grow apart: of equal ones it would not matter which is chosen."""
    upcycle(llava, num_experts=4, top_k=2)
    with torch.no_grad():
        for name, parameter in llava.named_parameters():
            if ".experts." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * parameter.std().item())


def make_batch(size: dict, device: str) -> dict:
    """Rows of one image and a text, the text being all response."""
    torch.manual_seed(2)
    vision, rows = size["vision"], size["rows"]
    text = torch.randint(1, IMAGE_ID, (rows, size["response"]))
    ids = torch.cat([torch.full((rows, vision.patches), IMAGE_ID), text], dim=1)      # (B, T)
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size)
    return {"input_ids": ids.to(device), "mask": (ids != IMAGE_ID).to(device), "pixel_values": pixels.to(device)}


def save_pair(size: dict, args: argparse.Namespace) -> None:
    """A dense teacher and a sparse student with the same ViT."""
    teacher = make_llava(size["teacher"], size["vision"], 0, args.device)
    teacher.save_pretrained(Path(args.folder) / "teacher", dtype=torch.bfloat16)
    student = make_llava(size["student"], size["vision"], 1, args.device, teacher.vision.state_dict())
    make_sparse(student)
    student.save_pretrained(Path(args.folder) / "student", dtype=torch.bfloat16)


def step_case(case: str, side: str, size: dict, args: argparse.Namespace) -> Callable:
    return (our_step if side == "ours" else their_step)(case, side, size, args)


def our_step(stage: str, side: str, size: dict, args: argparse.Namespace) -> Callable:
    """The body of train.py's loop, from its own parts."""
    dtype, folder = getattr(torch, size["dtype"]), Path(args.folder)
    # The balance loss is computed and then weighs nothing: transformers' is another one (not per sequence).
    config = Config(train.DEFAULTS | dict(stage=stage, teacher="teacher", balance_coef=0.0))
    student = Llava.from_pretrained(folder / "student", device=args.device)
    learns = train.choose_trainable(student, config, dtype)
    teacher = Llava.from_pretrained(folder / "teacher", dtype=dtype, device=args.device).requires_grad_(False).eval()
    if train.same_vision(student, teacher):
        teacher.vision = student.vision
    objective = train.Objective(student, config)
    weights = [parameter for _, parameter in learns]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)
    batch = make_batch(size, args.device)
    if stage == "pd":
        batch["pixel_values"] = batch["pixel_values"][::2]           # a pair shows the same images twice

    def run() -> dict:
        total = train.count_batch([batch], student, config)
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = train.image_features(student, batch, stage)
            reference = train.ask_teacher(teacher, batch, features, config)
            loss, _ = objective(batch, features, reference, total)
            loss.backward()
        return finish_step(loss, weights, optimizer, student.adaptor.linear_2.weight)
    return run


def their_step(stage: str, side: str, size: dict, args: argparse.Namespace) -> Callable:
    """The same step as the textbooks and TRL have it: logits of every position, the mask at the end."""
    dtype, folder = getattr(torch, size["dtype"]), Path(args.folder)
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    student = load(folder / "student", dtype=torch.float32).to(args.device).train()
    student.set_experts_implementation({"text_config": side})
    for name, parameter in student.named_parameters():
        parameter.requires_grad = any(part in name for part in ("multi_modal_projector", ".mlp.experts.", ".mlp.gate."))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    teacher = load(folder / "teacher", dtype=dtype).to(args.device).requires_grad_(False).eval()
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)
    batch = make_batch(size, args.device)
    if stage == "pd":
        batch["pixel_values"] = torch.cat([batch["pixel_values"][::2]] * 2)
    targets, mask = batch["input_ids"][:, 1:].flatten(), batch["mask"][:, 1:]
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"],
              "attention_mask": torch.ones_like(batch["input_ids"])}

    def run() -> dict:
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = student(**inputs).logits[:, :-1].flatten(0, 1)                      # (B (T-1), V)
            with torch.no_grad():
                teacher_logits = teacher(**inputs).logits[:, :-1].flatten(0, 1)
            if stage == "d2s":
                each = losses.forward_kl(logits, teacher_logits) + losses.cross_entropy(logits, targets)
                loss = (each * mask.flatten()).sum() / mask.sum()
            else:
                sums = [(-losses.cross_entropy(z, targets).view(mask.shape) * mask).sum(1) for z in (logits, teacher_logits)]
                chosen, rejected, ref_chosen, ref_rejected = (part for each in sums for part in each.chunk(2))
                loss = losses.preference(chosen, rejected, ref_chosen, ref_rejected).mean()
            loss.backward()
        return finish_step(loss, weights, optimizer, student.model.multi_modal_projector.linear_2.weight)
    return run


def finish_step(loss: torch.Tensor, weights: list, optimizer: torch.optim.Optimizer, watched: nn.Parameter) -> dict:
    norm, grad = nn.utils.clip_grad_norm_(weights, float("inf")), watched.grad
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), "grad_norm": norm, "adaptor": grad}


def step_products(size: dict, images: int) -> list[tuple]:
    """Every matrix product with a weight that a step of ours needs; products inside attention are left out."""
    student, teacher, vision = size["student"], size["teacher"], size["vision"]
    rows, P = size["rows"], vision.patches
    tokens, answers, Dv = rows * (P + size["response"]), rows * size["response"], vision.n_embd
    seen, run = images * (P + 1), vision.n_layer + 1 + vision.feature_layer              # the ViT's positions and layers
    layers = [(1, images * P, 3 * vision.patch_size ** 2, Dv, "f"), (4 * run, seen, Dv, Dv, "f"),
              (run, seen, Dv, vision.ffn, "f"), (run, seen, vision.ffn, Dv, "f")]
    for text, learns in [(student, True), (teacher, False)]:
        D, kv, n = text.n_embd, text.n_embd // text.n_head * text.n_kv_head, text.n_layer
        through = "fx" if learns else "f"                            # frozen, but the adaptor's gradient passes through
        layers += [(1, rows * P, Dv, D, "fw" if learns else "f"), (1, rows * P, D, D, "fxw" if learns else "f"),
                   (2 * n, tokens, D, D, through), (2 * n, tokens, D, kv, through),
                   (1, answers, D, text.vocab_size, through)]
        sparse = (n + 1) // 2 if learns else 0                       # every other layer, from the first: 4 experts, 2 a token
        for D_in, D_out, matrices in [(D, text.ffn, 2), (text.ffn, D, 1)]:
            layers.append((matrices * (n - sparse), tokens, D_in, D_out, through))
            layers.append((matrices * sparse * 4, tokens // 2, D_in, D_out, "fxw"))
    return [layer for layer in layers if layer[0]]


def bench_step(size: dict, args: argparse.Namespace) -> list[dict]:
    dtype, rows = getattr(torch, size["dtype"]), []
    with tempfile.TemporaryDirectory() as args.folder:
        save_pair(size, args)
        for stage, images, faster, smaller in [("d2s", size["rows"], ">= 2.2", "<= 0.5"), ("pd", size["rows"] // 2, "", "")]:
            sides = ["ours"] + EXPERTS * HAS_TRANSFORMERS
            runs = {side: step_case(stage, side, size, args) for side in sides}
            results = {side: run() for side, run in runs.items()}
            for side in sides[1:]:
                rows.append(figure(stage, f"largest relative difference, {side}",
                                   largest_difference(results["ours"], results[side]), "<= 0.05"))
            runs["products"], flops = bare_products(step_products(size, images), dtype, args.device)
            runs["products"]()
            seconds = take_turns(runs, args)
            del runs, results
            fastest = min(sides[1:], key=lambda side: statistics.median(seconds[side]), default=None)
            against = f"transformers, {fastest}"
            rows.append(speed(stage, "samples per second", seconds["ours"], seconds.get(fastest), against, faster))
            rows.append(figure(stage, "speed of the bare matrix products",
                               flops / statistics.median(seconds["products"]) / 1e9, unit="GFLOP/s"))
            rows.append(figure(stage, "share of that speed that the step reaches", 100 * statistics.median(
                a / b for a, b in zip(seconds["products"], seconds["ours"])), ">= 60" if stage == "d2s" else "", "%"))
            memory = {side: peak_memory("step", stage, side, args) for side in ("ours", fastest) if side}
            for what, where in [("total", "memory, all included"), ("above", "memory above weights and optimizer")]:
                theirs = [memory[fastest][what]] if fastest else None
                rows.append(cost(stage, where, [memory["ours"][what]], theirs, against, smaller, "B"))
    return rows


# -----------------------------------------------------------------------------
# generate: greedy answers to an image and a prompt, against transformers' generate

def bench_generate(size: dict, args: argparse.Namespace) -> list[dict]:
    new, rows = size["new"], []
    batch = make_batch(size | {"response": size["text"]}, args.device)
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    for kind in ("dense", "sparse"):
        with tempfile.TemporaryDirectory() as folder:
            llava = make_llava(size["student"], size["vision"], 0, args.device)
            if kind == "sparse":
                make_sparse(llava)
            llava.save_pretrained(folder, dtype=torch.bfloat16)
            for dtype, name in [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]:
                case = f"{kind} {name}, {ids.shape[0]} x ({ids.shape[1]} + {new})"
                rows += compare_generation(case, folder, dtype, ids, pixels, new, args, EXPERTS if kind == "sparse" else ["eager"])
    return rows


def compare_generation(case: str, folder: str, dtype: torch.dtype, ids: torch.Tensor, pixels: torch.Tensor, new: int,
                       args: argparse.Namespace, implementations: list[str]) -> list[dict]:
    rows, pixels = [], pixels.to(dtype)
    llava = Llava.from_pretrained(folder, dtype=dtype, device=args.device).eval()
    runs = {("ours", n): partial(llava.generate, ids, pixels, max_new_tokens=n) for n in (1, new)}
    answer = runs["ours", new]()                                     # (B, new)
    if HAS_TRANSFORMERS:
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(args.device).eval()

        def generate(implementation: str, n: int) -> torch.Tensor:
            theirs.set_experts_implementation({"text_config": implementation})
            return theirs.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
                                   max_new_tokens=n, do_sample=False)[:, ids.shape[1]:]

        runs |= {(side, n): partial(generate, side, n) for side in implementations for n in (1, new)}
        same = [(answer == runs[side, new]()).float().mean().item() * 100 for side in implementations]
        rows.append(figure(case, "tokens as transformers'", min(same), ">= 100" if dtype == torch.float32 else "", "%"))
        # In bf16 near-ties may fall either way, and the rest of that row differs. So ask transformers about our answer.
        with torch.no_grad():
            logits = theirs(input_ids=torch.cat([ids, answer], 1), pixel_values=pixels, logits_to_keep=new + 1).logits
        logits = logits[:, :-1].float()                              # (B, new, V): transformers', given our tokens so far
        behind = (logits.amax(-1) - logits.gather(-1, answer[..., None])[..., 0]) / logits.std(-1)
        rows.append(figure(case, "our tokens behind transformers' best, at most", behind.max().item(), "<= 0.1", "std"))
    seconds = take_turns(runs, args)
    fastest = min(implementations, key=lambda side: statistics.median(seconds.get((side, new), [0])))
    against = f"transformers, {fastest}"
    for what, part in [("all", lambda side: seconds[side, new]), ("prompt and first token", lambda side: seconds[side, 1]),
                       ("each further token", lambda side: [(b - a) / (new - 1) for a, b in
                                                            zip(seconds[side, 1], seconds[side, new])])]:
        rows.append(speed(case, f"speed, {what}", part("ours"), part(fastest) if HAS_TRANSFORMERS else None, against,
                          ">= 2" if what == "all" else ""))
    return rows


# -----------------------------------------------------------------------------
# data: pixels per second, padding, the index

def bench_data(size: dict, args: argparse.Namespace) -> list[dict]:
    return compare_pixels(size, args) + measure_padding(size) + measure_index(size, args)


def compare_pixels(size: dict, args: argparse.Namespace) -> list[dict]:
    rng, side, rows = np.random.default_rng(0), size["side"], []
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jpg" for i in range(size["images"])]
        for i, path in enumerate(paths):                             # smooth colours with a little noise: photo-like
            width, height = [(640, 480), (480, 640), (640, 427), (500, 375)][i % 4]
            smooth = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
            smooth = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(path, quality=90)
        images = [data.load_image(path) for path in paths]
        runs = {"ours pil": lambda: torch.stack([data.transform_image(image, side) for image in images]),
                "ours jpeg": lambda: torch.stack([data.transform_image(data.load_image(path), side) for path in paths])}
        name = "not installed"
        if HAS_TRANSFORMERS:
            # The fast path needs torchvision, and transformers falls back to Pillow without it.
            name = "LlavaImageProcessor" + ("" if importlib.util.find_spec("torchvision") else "Pil")
            process = getattr(transformers, name)(do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side})
            theirs = lambda images: process(images=images, return_tensors="pt").pixel_values
            runs |= {"theirs pil": lambda: theirs(images),
                     "theirs jpeg": lambda: theirs([Image.open(path) for path in paths])}
            std = torch.tensor(data.CLIP_STD)[:, None, None]
            off = max(((runs[f"ours {kind}"]() - runs[f"theirs {kind}"]()) * std).abs().max().item() for kind in ("pil", "jpeg"))
            rows.append(figure("pixels", "largest difference of 255", off * 255, "<= 1.0"))
        seconds = take_turns(runs, args)
    for kind in ("pil", "jpeg"):
        each = {who: [s / len(paths) for s in seconds[f"{who} {kind}"]] for who in ("ours", "theirs") if f"{who} {kind}" in runs}
        rows.append(speed(f"pixels from {kind}", "images per second", each["ours"], each.get("theirs"), name, ">= 1.0"))
    return rows


def measure_padding(size: dict) -> list[dict]:
    """
    How many of the tokens in our micro-batches are padding, at 128 rows a step on 16 ranks.

    The mix: nine rows in ten have an image, 576 positions, and a text of log-normal length, median 100 (sigma 0.9); the
    tenth is text alone, median 300 (sigma 1); all cut at 2,048.
    """
    rng, n = np.random.default_rng(0), size["rows"]
    has_image = rng.random(n) < 0.9
    text = np.where(has_image, rng.lognormal(np.log(100), 0.9, n), rng.lognormal(np.log(300), 1.0, n))
    lengths = np.minimum(576 * has_image + text.astype(int) + 1, 2048)
    sampler, rows = data.Sampler(lengths.tolist(), batch_size=128), []
    steps = range(min(200, sampler.steps_per_epoch))
    for micro in (2, 4, 8):
        share = {}
        for order in ("sampler", "random"):
            real = padded = 0
            for step in steps:
                batch = sampler.batch(step) if order == "sampler" else rng.permutation(n)[:128].tolist()
                for rank in range(16):
                    for part in data.micro_batches(batch, micro, rank, 16):
                        real += lengths[part].sum()
                        padded += len(part) * lengths[part].max()
            share[order] = 100 * (1 - real / padded)
        case = f"padding, micro-batch {micro}"
        rows.append(figure(case, "of all tokens", share["sampler"], "<= 5", "%"))
        rows.append(figure(case, "of all tokens, rows in random order", share["random"], unit="%"))
    return rows


def measure_index(size: dict, args: argparse.Namespace) -> list[dict]:
    """Memory and start-up time with an index of many rows."""
    return []


# -----------------------------------------------------------------------------

CASES = {"loss": loss_case, "step": step_case}                       # what is measured in a process of its own
SECTIONS = {"loss": bench_loss, "moe": bench_moe, "step": bench_step, "generate": bench_generate, "data": bench_data}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory beside what a user would otherwise run.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; none means all")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of every timing")
    parser.add_argument("--quick", action="store_true", help="toy sizes: do both sides agree?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--memory", help=argparse.SUPPRESS)          # "case,side": how this script calls itself
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; known are {', '.join(SECTIONS)}")
    return args


def main(argv: list[str]) -> dict:
    args = parse(argv)
    if args.memory:
        case, side = args.memory.split(",")
        print(json.dumps(measure_memory(args.sections[0], case, side, args)))
        return {}
    packages = ["torch", "transformers", "numpy", "pillow"]
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name.replace("pillow", "PIL"))}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": args.device,
               "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None, "memory_env": MEMORY_ENV,
               "python": platform.python_version(), **versions}
    print("  ".join(f"{key} {value}" for key, value in machine.items() if key != "memory_env" and value is not None))
    report = {"machine": machine, "repeats": args.repeats, "quick": args.quick, "sections": {}}
    for section in args.sections or SECTIONS:
        rows = SECTIONS[section]((QUICK if args.quick else REAL)[section], args)
        for row in rows:
            row["met"] = is_met(row)
        print_table(section, rows)
        report["sections"][section] = rows
        write_file(Path(args.out), json.dumps(report, indent=1))
    return report


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main(sys.argv[1:])
