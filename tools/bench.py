"""
Speed and memory of this code next to what a user would otherwise run, as ratios measured in one and the same run.

    python -m tools.bench                                    all sections
    python -m tools.bench --sections=loss,moe --repeats=3    some of them, with fewer rounds
    python -m tools.bench --quick                            toy sizes: do both sides agree? Times mean nothing there

    section    ours                                        next to
    loss       each token loss through the output head     the plain formula on full logits
    moe        a sparse layer                              the dense FFN; transformers' layer
    step       an optimizer step of d2s and pd             the same step with transformers and full logits
    signals    a step of d2d with one more signal          the step with the KL alone
    generate   greedy answers                              transformers' generate
    evaluate   short questions about one image             transformers' generate; ours without the shared prefix
    data       images to pixels; padding                   transformers' processor; rows in random order
    cache      a step of d2s from the teacher cache        the step with the teacher; the KL of all tokens

Widths and vocabulary are real (Qwen2-0.5B, Qwen1.5-1.8B, CLIP-L, 151,936 tokens), layers are few and weights random.
Where two sides should compute the same, a section first checks that they do. How time and memory are measured:
tools/measure.py. The tables go to the screen, every raw number to bench.json; a missed target is printed like a met
one. docs/performance.md holds the numbers of a full run.
"""
import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models
from torch import nn

import data
import losses
import train
from configurator import POSITIVE, Config, UserError, check_values, expected, load_config, run
from engine import prefix
from engine.chunked import chunked_loss
from engine.distributed import Dist, parallelize
from engine.files import write_json
from engine.hf import same_vision
from engine.teacher_cache import TeacherCache
from losses import TeacherReference
from model import FFN, DecoderConfig, Llava, LlavaConfig, VisionConfig
from moe import SparseFFN, upcycle
from tools import plan
from tools.measure import MEMORY_ENV, bare_products, fastest, largest_difference, peak_bytes, row, show, take_turns

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if HAS_TRANSFORMERS:
    import transformers
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Initializing zero-element")               # its shared expert of width 0

DEFAULTS = dict(
    sections="",                # which, with commas; empty: all
    repeats=7,                  # rounds of every timing
    quick=False,                # toy sizes
    device="",                  # cpu | cuda; empty: cuda if there is one
    dtype="",                   # bfloat16 | float32, of loss, step, signals and cache; empty: bfloat16, as in training
    out="bench.json",
    memory="",                  # CASE,SIDE: measure the memory of this alone, ...
    folder="",                  # ... with the checkpoints in this folder. This is how the program calls itself
)
EXPERTS = ["eager", "grouped_mm"] if HAS_TRANSFORMERS else []    # transformers' ways to run experts; the faster counts
IMAGE_ID = 151646

qwen2, qwen15 = plan.DECODERS["Qwen/Qwen2-0.5B"], plan.DECODERS["Qwen/Qwen1.5-1.8B"]
REAL = {
    "loss": dict(tokens=1024, vocab=151936, student=896, teacher=3584, dtype="bfloat16"),
    "moe": dict(tokens=2048, width=896, n_ffn=4864),
    "step": dict(student=replace(qwen2, n_layer=8), teacher=replace(qwen15, n_layer=8), vision=VisionConfig(n_layer=4),
                 rows=2, prompt=0, response=128, dtype="bfloat16"),
    "generate": dict(student=replace(qwen2, n_layer=4), vision=VisionConfig(n_layer=2), rows=16, prompt=32, response=0,
                     new=64),
    "evaluate": dict(student=replace(qwen2, n_layer=8), vision=VisionConfig(n_layer=4), system=35, question=(8, 24),
                     images=[(2, 10), (2, 31)], new=8),         # so many images in a batch, so many questions about each
    "data": dict(images=64, side=336, rows=100_000),
}
small, small_vision = DecoderConfig(151_656, 32, 2, 4, 2, 48, tied=True), VisionConfig(28, 14, 32, 2, 4, 64)
QUICK = {
    "loss": dict(tokens=24, vocab=515, student=16, teacher=32, dtype="bfloat16"),
    "moe": dict(tokens=48, width=32, n_ffn=64),
    "step": dict(student=small, teacher=replace(small, n_embd=48, n_ffn=64, tied=False, head_dim=12), vision=small_vision,
                 rows=2, prompt=0, response=6, dtype="float32"),
    "generate": dict(student=small, vision=small_vision, rows=3, prompt=6, response=0, new=6),
    "evaluate": dict(student=small, vision=small_vision, system=3, question=(2, 5), images=[(2, 3)], new=3),
    "data": dict(images=6, side=56, rows=2_000),
}
for sizes, half in (REAL, 64), (QUICK, 3):
    sizes["cache"] = sizes["step"]
    sizes["signals"] = sizes["step"] | dict(prompt=half, response=half)


def size_of(section: str, options: Config) -> dict:
    size = (QUICK if options.quick else REAL)[section]
    return size | {"dtype": options.dtype} if options.dtype and "dtype" in size else size


# -----------------------------------------------------------------------------
# Memory is measured in a process of its own: this program, with --memory

def measure_memory(section: str, case: str, side: str, options: Config) -> dict[str, int]:
    """Peak bytes of one run, "above" what was held before it and in "total". What is allocated once does not count."""
    size = size_of(section, options)
    if section == "loss":
        toy = size_of(section, Config(options, quick=True))
        CASES[section](case, side, toy, options)()                   # what libraries allocate, ...
    run_once = CASES[section](case, side, size, options)
    if section != "loss":
        run_once()                                                   # ... and Adam's moments
    return peak_bytes(run_once, options.device)


def peak_memory(section: str, case: str, side: str, options: Config) -> dict[str, int]:
    if options.quick:                                                # means nothing then: no process is started
        return measure_memory(section, case, side, options)
    command = [sys.executable, "-m", "tools.bench", f"--sections={section}", f"--memory={case},{side}",
               f"--device={options.device}", f"--dtype={options.dtype}", f"--folder={options.folder}"]
    output = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | MEMORY_ENV, check=True,
                            stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def memory_rows(case: str, ours: dict[str, int], peer: dict[str, int] | None, against: str,
                target: str = "") -> Iterator[dict]:
    for what, measure in [("total", "memory, all included"), ("above", "memory above weights and optimizer")]:
        yield row(case, measure, "B", ours[what], peer[what] if peer else None, against, target)


# -----------------------------------------------------------------------------
# loss: from the last hidden states through heads of 151,936 rows to the loss, and back to the hidden states

LOSSES = ["forward frozen", "forward trained", "reverse frozen", "jsd frozen", "jsd trained", "mse frozen", "ce frozen",
          "ce trained", "logp frozen"]
LONG = ["forward frozen long", "forward trained long"]               # 8 times the tokens, where full logits hardly fit


def our_loss(what, hidden, head, teacher, targets) -> torch.Tensor:
    """The values of `plain_loss`, from chunked_loss as train.py uses it."""
    loss = partial(chunk_loss, what=what, targets=targets)
    each, _ = chunked_loss(hidden, head, loss, teacher=teacher if what in losses.TOKEN_LOSSES else None)
    if what == "logp":
        with torch.no_grad():
            reference, _ = chunked_loss(teacher.hidden, teacher.head, loss)
        each = each - reference
    return each


def chunk_loss(logits: torch.Tensor, chunk: slice, teacher_logits=None, *, what, targets) -> tuple[torch.Tensor, dict]:
    if teacher_logits is not None:
        each = losses.distillation(logits, teacher_logits, what)
    else:
        each = losses.cross_entropy(logits, targets[chunk])
    return each, {what: each}


def plain_loss(what, hidden, head, teacher, targets) -> torch.Tensor:
    """The formulas of losses.py on full logits -> one value per token (N,). logp: the log-ratios of pd."""
    student_logits = F.linear(hidden, head)                          # (N, V)
    if what == "ce":
        return losses.cross_entropy(student_logits, targets)
    with torch.no_grad():
        teacher_logits = F.linear(teacher.hidden, teacher.head)      # (N, V)
    if what == "logp":
        return losses.cross_entropy(student_logits, targets) - losses.cross_entropy(teacher_logits, targets)
    return losses.TOKEN_LOSSES[what](student_logits, teacher_logits)


def trl_loss(what, hidden, head, teacher, targets) -> torch.Tensor:
    """By tiles of tokens and vocabulary, all of them computed again in the backward pass."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    each, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher.hidden, teacher.head, None, 0.0)   # 0: forward
    return each


def torchtune_loss(what, hidden, head, teacher, targets) -> torch.Tensor:
    """All logits exist, only the softmax is taken by chunks. -> the cross-entropy to the teacher, summed (1,)."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss
    loss = ForwardKLWithChunkedOutputLoss()
    student_logits, teacher_logits = ([F.linear(part, weight)[None] for part in x.chunk(loss.num_output_chunks)]
                                      for x, weight in ((hidden, head), (teacher.hidden, teacher.head)))
    return loss(student_logits, teacher_logits, targets[None])[None] * len(targets)


LOSS_SIDES = {"ours": our_loss, "plain": plain_loss, "trl": trl_loss, "torchtune": torchtune_loss}
CHUNKED_PEERS = [name for name in ("trl", "torchtune") if importlib.util.find_spec(name)]        # optional; forward KL only


def loss_case(case: str, side: str, size: dict, options: Config) -> Callable:
    what, kind, *long = case.split()
    torch.manual_seed(0)
    draw = partial(torch.randn, device=options.device)
    N, V, D, Dt = size["tokens"] * (8 if long else 1), size["vocab"], size["student"], size["teacher"]
    dtype = getattr(torch, size["dtype"])
    # A trained student (d2d) keeps weights and residual stream in fp32, a frozen head (d2s, pd) is in `dtype`.
    own = torch.float32 if kind == "trained" else dtype
    hidden, head = draw(N, D).to(own).requires_grad_(), (draw(V, D) * 2 / D ** 0.5).to(own)
    head.requires_grad_(kind == "trained")
    teacher = TeacherReference(hidden=draw(N, Dt).to(dtype), head=(draw(V, Dt) * 2 / Dt ** 0.5).to(dtype))
    targets = torch.randint(V, (N,), device=options.device)

    def run_once() -> list[torch.Tensor]:
        hidden.grad = head.grad = None
        with torch.autocast(options.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            each = LOSS_SIDES[side](what, hidden, head, teacher, targets)
            (each.sum() / N).backward()
        return [hidden.grad] + [head.grad] * head.requires_grad + [each.detach()] * (side != "torchtune")
    return run_once


def bench_loss(size: dict, options: Config) -> Iterator[dict]:
    for case in LOSSES + (LONG if CHUNKED_PEERS else []):
        peers = {"plain": ("full logits", "<= 1.1", "<= 0.1")} if case in LOSSES else {}
        if case.startswith("forward"):
            peers |= {name: (name, "<= 1.11", "<= 1") for name in CHUNKED_PEERS}
        runs = {side: loss_case(case, side, size, options) for side in ("ours", *peers)}
        ours = runs["ours"]()
        for side, (against, _, _) in peers.items():
            theirs = runs[side]()
            yield row(case, f"largest relative difference, {against}", "", largest_difference(ours[:len(theirs)], theirs),
                      target="<= 0.02")
        del ours, theirs
        seconds = take_turns(runs, options)
        del runs
        head = 4 * size["vocab"] * size["student"] if "trained" in case else 0       # its gradient is needed either way
        memory = {side: peak_memory("loss", case, side, options)["above"] - head for side in ("ours", *peers)}
        for side, (against, time_target, memory_target) in peers.items():
            yield row(case, "time", "s", seconds["ours"], seconds[side], against, time_target)
            yield row(case, "memory above inputs", "B", memory["ours"], memory[side], against, memory_target)


# -----------------------------------------------------------------------------
# moe: one sparse layer, forward and backward, next to the dense FFN and transformers' layer

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


def their_layer(ours: SparseFFN, width: int, n_ffn: int) -> nn.Module:
    """transformers' qwen2_moe layer as our checkpoints configure it, with our weights."""
    config = transformers.Qwen2MoeConfig(
        hidden_size=width, moe_intermediate_size=n_ffn, num_experts=len(ours.experts), num_experts_per_tok=ours.top_k,
        norm_topk_prob=ours.norm_topk, shared_expert_intermediate_size=0)
    layer = Qwen2MoeSparseMoeBlock(config)
    with torch.no_grad():
        layer.gate.weight.copy_(ours.router.weight)
        for e, expert in enumerate(ours.experts):
            layer.experts.gate_up_proj[e] = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            layer.experts.down_proj[e] = expert.down_proj.weight
        nn.init.zeros_(layer.shared_expert_gate.weight)
    return layer


def gradients(layer: nn.Module) -> list[torch.Tensor]:
    """Of the router and of each expert's down_proj."""
    if isinstance(layer, SparseFFN):
        return [layer.router.weight.grad, *(expert.down_proj.weight.grad for expert in layer.experts)]
    return [] if isinstance(layer, FFN) else [layer.gate.weight.grad, *layer.experts.down_proj.grad]


def moe_runs(size: dict, dtype: torch.dtype, options: Config) -> dict[str, Callable]:
    """Every variant by name: "dense", and for each of three shapes "E4T1 ours", "E4T1 eager", "E4T1 grouped_mm"."""
    torch.manual_seed(0)
    n, D, n_ffn = size["tokens"], size["width"], size["n_ffn"]
    upstream = torch.randn(2, n // 2, D, device=options.device).to(dtype)

    def training(layer: nn.Module, x: torch.Tensor, implementation: str = "") -> Callable:
        layer.to(options.device)                                     # weights stay fp32, as in training
        x = x.to(options.device, dtype).requires_grad_()

        def run_once() -> list[torch.Tensor]:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            if implementation:
                layer.experts.config._experts_implementation = implementation
            with torch.autocast(options.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = layer(x)
                y = y[0] if isinstance(y, tuple) else y              # ours returns its routing as well
            y.backward(upstream.to(y.dtype))
            return [y.detach(), x.grad, *gradients(layer)]
        return run_once

    runs = {"dense": training(FFN(D, n_ffn), torch.randn(2, n // 2, D))}
    for E, A in [(4, 1), (4, 2), (16, 2)]:
        # Top 1 is not renormalized here: with it our router has a gradient and transformers' has none.
        layer = SparseFFN([FFN(D, n_ffn) for _ in range(E)], D, A, norm_topk=A > 1)
        x = routed_tokens(n, layer.router.weight)
        runs[f"E{E}T{A} ours"] = training(layer, x)
        if HAS_TRANSFORMERS:
            theirs = their_layer(layer, D, n_ffn)
            runs |= {f"E{E}T{A} {implementation}": training(theirs, x, implementation) for implementation in EXPERTS}
    return runs


def bench_moe(size: dict, options: Config) -> Iterator[dict]:
    n, D, n_ffn = size["tokens"], size["width"], size["n_ffn"]
    shapes = ["E4T1", "E4T2", "E16T2"]
    for dtype, kind, tolerance in [(torch.float32, "fp32", "<= 1e-4"), (torch.bfloat16, "bf16", "<= 0.03")]:
        runs = moe_runs(size, dtype, options)
        for shape in shapes:
            ours = runs[f"{shape} ours"]()
            for name in EXPERTS:
                yield row(f"{shape} {kind}", f"largest relative difference, {name}", "",
                          largest_difference(ours, runs[f"{shape} {name}"]()), target=tolerance)
        del ours
        runs["dense"]()
        layers = [(2, n, D, n_ffn, "fxw"), (1, n, n_ffn, D, "fxw")]
        runs["products"], flops = bare_products(layers, dtype, options.device)
        runs["products"]()
        seconds = take_turns(runs, options)
        del runs
        yield row(f"dense {kind}", "bare matrix products", "GFLOP/s", [flops / s / 1e9 for s in seconds["products"]])
        yield row(f"dense {kind}", "time", "s", seconds["dense"], seconds["products"], "bare matrix products")
        for shape, peer, target in zip(shapes, ["dense", "dense", "E4T2 ours"], ["<= 1.15", "<= 2.2", "<= 1.15"]):
            ours = seconds[f"{shape} ours"]
            yield row(f"{shape} {kind}", "time", "s", ours, seconds[peer], peer, target)
            theirs = {name: seconds[f"{shape} {name}"] for name in EXPERTS}
            best = fastest(theirs)
            yield row(f"{shape} {kind}", "time", "s", ours, theirs.get(best), f"transformers, {best}", "<= 1.0")


# -----------------------------------------------------------------------------
# step: a whole optimizer step of d2s and of pd, next to the same step written with transformers and full logits

def make_llava(decoder: DecoderConfig, vision: VisionConfig, seed: int, sparse: bool, device: str) -> Llava:
    """Random weights: torch's initialization, with embeddings small enough for logits of ordinary size."""
    torch.manual_seed(seed)
    with torch.device(device):
        llava = Llava(LlavaConfig(vision, replace(decoder), IMAGE_ID, pad_token_id=0, eos_token_id=None, template=None))
    with torch.no_grad():
        llava.decoder.embedding.weight.mul_(0.05)
        if sparse:
            upcycle(llava, num_experts=4, top_k=2)
            for name, parameter in llava.named_parameters():         # equal experts would hide a wrong choice
                if ".experts." in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3 * parameter.std().item())
    return llava


def make_batch(size: dict, device: str) -> dict:
    """Rows of an image, a prompt and a response, all of random tokens."""
    torch.manual_seed(2)
    vision, rows, text = size["vision"], size["rows"], size["prompt"] + size["response"]
    ids = torch.full((rows, vision.patches + text), IMAGE_ID)                            # (B, T)
    ids[:, vision.patches:] = torch.randint(1, IMAGE_ID, (rows, text))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, vision.patches + size["prompt"]:] = True
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size)
    return {"input_ids": ids.to(device), "mask": mask.to(device), "pixel_values": pixels.to(device)}


def save_pair(size: dict, folder: str, sparse: bool, device: str) -> None:
    """A dense teacher and a student with the same ViT."""
    teacher = make_llava(size["teacher"], size["vision"], 0, False, device)
    student = make_llava(size["student"], size["vision"], 1, sparse, device)
    student.vision = teacher.vision
    for name, llava in [("teacher", teacher), ("student", student)]:
        llava.save_pretrained(Path(folder) / name, dtype=torch.bfloat16)


def make_config(stage: str, size: dict, options: Config, **settings) -> Config:
    """The settings that train.py would have from flags."""
    flags = dict(stage=stage, student=f"{options.folder}/student", teacher=f"{options.folder}/teacher", data="random",
                 out_dir="none", batch_size=size["rows"], micro_batch_size=size["rows"], dtype=size["dtype"],
                 device=options.device) | settings
    if stage in ("d2s", "pd"):
        flags["balance_coef"] = 0.0      # computed, and then it weighs nothing: transformers' is another one (not per sequence)
    if settings.get("on_policy"):
        flags["on_policy_tokens"] = size["response"]
    return train.configure([f"--{key}={value}" for key, value in flags.items()])


def make_run(config: Config, size: dict) -> tuple[train.Run, dict]:
    """What train.setup makes, for a random batch; and the batch. With a teacher_cache, its part of it is made here."""
    device, dtype, cache = torch.device(config.device), getattr(torch, config.dtype), None
    student = Llava.from_pretrained(config.student, device=device)
    train.choose_trainable(student, config, dtype)
    teacher = Llava.from_pretrained(config.teacher, dtype, device).requires_grad_(False).eval()
    assert same_vision(student, teacher)
    teacher.vision = student.vision
    if config.on_policy:                                             # sampling excludes ids that a tokenizer lacks
        student.tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(IMAGE_ID)}, unk_token="0"))
    width, batch = teacher.config.decoder.n_embd, make_batch(size, config.device)
    if config.stage == "pd":
        batch["pixel_values"] = batch["pixel_values"][::2]           # a pair shows the same image twice
    batch = train.add_positions(batch, student.config, config)
    if config.teacher_cache:
        cache = TeacherCache(config.teacher_cache, size["rows"], {"vocabulary": student.config.decoder.vocab_size})
        with train.autocast(config, device):
            outputs, _ = train.teacher_targets(teacher, batch, config, cache.vocab_size, device)
        batch, teacher = batch | outputs, None
    dist = Dist(rank=0, local_rank=0, world_size=1, device=device, control=None)
    objective, optimizer, trainable = parallelize(
        train.Objective(student, config, width), dist, config.parallel, dtype, lr=config.learning_rate,
        betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay)
    sampler = data.Sampler([batch["input_ids"].shape[1]] * size["rows"], size["rows"])
    return train.Run(config, dist, student, teacher, cache, objective, optimizer, trainable, sampler=sampler), batch


def one_step(run: train.Run, batch: dict) -> list[torch.Tensor]:
    """train.py's step at learning rate 0, so that every run starts from the same weights
    -> the loss, the gradient's norm and, seen just before the optimizer's step, the gradient of one weight."""
    micro_batches, watched = [batch], []
    if run.config.on_policy:
        micro_batches, _ = train.sample_step(run, micro_batches, step=1)
    total = train.count_batch(micro_batches, run.config)
    weight = run.student.adaptor.linear_2.weight
    hook = run.optimizer.register_step_pre_hook(lambda *_: watched.append(weight.grad))
    loss, _, grad_norm = train.train_step(run, micro_batches, total, lr=0.0)
    hook.remove()
    return [torch.tensor(loss), torch.tensor(grad_norm), *watched]


def our_step(stage: str, size: dict, options: Config, **settings) -> Callable:
    return partial(one_step, *make_run(make_config(stage, size, options, **settings), size))


def their_step(stage: str, size: dict, options: Config) -> Callable:
    """The same step as textbooks and TRL have it, with logits of every position -> run_once(way to run the experts)."""
    dtype, load = getattr(torch, size["dtype"]), transformers.LlavaForConditionalGeneration.from_pretrained
    student = load(f"{options.folder}/student", dtype=torch.float32).to(options.device).train()
    for name, parameter in student.named_parameters():
        parameter.requires_grad = any(part in name for part in ("multi_modal_projector", ".mlp.experts.", ".mlp.gate."))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    teacher = load(f"{options.folder}/teacher", dtype=dtype).to(options.device).requires_grad_(False).eval()
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)
    batch = make_batch(size, options.device)
    pixels = batch["pixel_values"] if stage == "d2s" else batch["pixel_values"][::2].repeat(2, 1, 1, 1)
    inputs = dict(input_ids=batch["input_ids"], pixel_values=pixels, attention_mask=torch.ones_like(batch["input_ids"]))
    targets, mask = batch["input_ids"][:, 1:].flatten(), batch["mask"][:, 1:]            # (B (T-1)), (B, T-1)

    def run_once(implementation: str) -> list[torch.Tensor]:
        student.set_experts_implementation({"text_config": implementation})
        with torch.autocast(options.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = student(**inputs).logits[:, :-1].flatten(0, 1)                      # (B (T-1), V)
            with torch.no_grad():
                teacher_logits = teacher(**inputs).logits[:, :-1].flatten(0, 1)
            if stage == "d2s":
                each = losses.forward_kl(logits, teacher_logits) + losses.cross_entropy(logits, targets)
                loss = (each * mask.flatten()).sum() / mask.sum()
            else:
                sums = [(-losses.cross_entropy(each, targets).view(mask.shape) * mask).sum(1)
                        for each in (logits, teacher_logits)]                            # (B,) twice
                loss = losses.dpo(*sums[0].chunk(2), *sums[1].chunk(2)).mean()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, float("inf"))
        grad = student.model.multi_modal_projector.linear_2.weight.grad
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [loss.detach(), norm, grad]
    return run_once


def step_case(case: str, side: str, size: dict, options: Config) -> Callable:
    return our_step(case, size, options) if side == "ours" else partial(their_step(case, size, options), side)


def weight_products(llava: Llava, batch: plan.Batch) -> list[tuple]:
    """Every product with a weight of a pass, and of its backward where weights are trainable, as `bare_products` takes
    them. Without the routers' few; attention's own products are left out, too."""
    layers, upstream = Counter(), False                              # is anything before this matrix trainable?
    for name, _, p, vectors in plan.products(llava, batch):
        if vectors and ".router." not in name:
            layers[int(vectors), p[0].numel(), len(p), "f" + "x" * upstream + "w" * p.requires_grad] += 1
        upstream = upstream or p.requires_grad
    return [(count, *layer) for layer, count in layers.items()]


def describe_step(stage: str, size: dict, options: Config) -> tuple[list[tuple], float]:
    """The products of a step of ours, and the bytes of both models' weights, the gradients and Adam's moments: what the
    step must hold however it is done."""
    config = make_config(stage, size, options)
    student, teacher = plan.build(config)
    items = size["rows"] // 2 if stage == "pd" else size["rows"]
    batch = plan.Batch.of(config, items, size["vision"].patches + size["response"], size["response"])
    memory = plan.memory(student, teacher, config, 1, batch)
    held = sum(memory[name] for name in ("trainable weights, fp32", "frozen weights", "teacher", "gradients, fp32",
                                         "Adam's moments, fp32"))
    products = weight_products(student, batch) + weight_products(teacher, batch._replace(images=0))   # one ViT for both
    return products, held


def bench_step(size: dict, options: Config) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        save_pair(size, folder, True, options.device)
        options = Config(options, folder=folder)
        yield from compare_steps("d2s", size, options, speed=">= 2.2", memory="<= 0.5", share=">= 0.6")
        yield from compare_steps("pd", size, options, speed="", memory="", share="")


def compare_steps(stage: str, size: dict, options: Config, speed: str, memory: str, share: str) -> Iterator[dict]:
    """speed, memory: targets against transformers; share: of the bare products' speed."""
    runs = {"ours": our_step(stage, size, options)}
    if HAS_TRANSFORMERS:
        theirs = their_step(stage, size, options)
        runs |= {side: partial(theirs, side) for side in EXPERTS}
        del theirs
    results = {side: run_once() for side, run_once in runs.items()}
    for side in EXPERTS:
        yield row(stage, f"largest relative difference, {side}", "",
                  largest_difference(results["ours"], results[side]), target="<= 0.05")
    layers, held = describe_step(stage, size, options)
    runs["products"], flops = bare_products(layers, getattr(torch, size["dtype"]), options.device)
    runs["products"]()
    seconds = take_turns(runs, options)
    del runs, results
    best = fastest({side: seconds[side] for side in EXPERTS})
    against = f"transformers, {best}"
    rate = {side: [size["rows"] / s for s in each] for side, each in seconds.items()}
    yield row(stage, "speed", "rows/s", rate["ours"], rate.get(best), against, speed)
    gflops = {side: [flops / s / 1e9 for s in each] for side, each in seconds.items()}
    yield row(stage, "speed", "GFLOP/s", gflops["ours"], gflops["products"], "bare matrix products", share)
    ours = peak_memory("step", stage, "ours", options)
    theirs = peak_memory("step", stage, best, options) if best else None
    yield from memory_rows(stage, ours, theirs, against, memory)
    yield row(stage, "weights, gradients and Adam, counted", "B", held, theirs["total"] if best else None, against)


# -----------------------------------------------------------------------------
# signals: what each further signal adds to a step of d2d that distills the response tokens alone

SIGNALS = {
    "KL": {},
    "KL + hidden": dict(hidden_weight=1.0),
    "KL + affinity": dict(affinity_weight=1.0),
    "KL + relation": dict(relation_weight=1.0),
    "KL, prompt and response": dict(kd_tokens="all"),
    "KL, response and image": dict(kd_tokens="response+image"),
    "KL, on-policy": dict(on_policy=1.0),    # answers as long as the data's: these models have no end token
}


def signal_case(case: str, side: str, size: dict, options: Config) -> Callable:
    return our_step("d2d", size, options, **SIGNALS[case])


def with_settings(run: train.Run, config: Config) -> train.Run:
    """The same models and optimizer under other settings: a set of them for each signal would not fit into memory."""
    objective = copy.copy(run.objective)                             # shares its parameters
    objective.config = config
    trainable = {name: p for name, p in run.trainable.items() if config.hidden_weight or "hidden_map" not in name}
    return replace(run, config=config, objective=objective, trainable=trainable)


def bench_signals(size: dict, options: Config) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        save_pair(size, folder, False, options.device)
        options = Config(options, folder=folder)
        shared, batch = make_run(make_config("d2d", size, options, hidden_weight=1.0, on_policy=1.0), size)
        runs = {}
        for case, settings in SIGNALS.items():
            config = make_config("d2d", size, options, **settings)
            runs[case] = partial(one_step, with_settings(shared, config), train.add_positions(batch, shared.student.config, config))
        del shared
        for case in SIGNALS:
            runs[case]()
        seconds = take_turns(runs, options)
        del runs
        memory = {case: peak_memory("signals", case, "ours", options) for case in SIGNALS}
    yield row("KL", "time", "s", seconds["KL"])
    yield row("KL", "memory, all included", "B", memory["KL"]["total"])
    for case in list(SIGNALS)[1:]:
        yield row(case, "time", "s", seconds[case], seconds["KL"], "KL")
        yield from memory_rows(case, memory[case], memory["KL"], "KL")


# -----------------------------------------------------------------------------
# generate: greedy answers to an image and a prompt, next to transformers' generate

def bench_generate(size: dict, options: Config) -> Iterator[dict]:
    for sparse in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            llava = make_llava(size["student"], size["vision"], 0, sparse, options.device)
            llava.save_pretrained(folder, dtype=torch.bfloat16)
            del llava
            for dtype, kind in [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]:
                yield from compare_generation(f"{'E4T2' if sparse else 'dense'} {kind}", folder, dtype, size, options)


def prompt_products(llava: Llava, ids: torch.Tensor) -> list[tuple]:
    rows, tokens = ids.shape
    return weight_products(llava, plan.Batch(rows, tokens, targets=rows, images=rows, prompt=tokens))   # the head at the last position


def compare_generation(case: str, folder: str, dtype: torch.dtype, size: dict, options: Config) -> Iterator[dict]:
    batch, new = make_batch(size, options.device), size["new"]
    ids, pixels = batch["input_ids"], batch["pixel_values"].to(dtype)
    B, T = ids.shape
    case = f"{case}, {B} x ({T} + {new})"
    ours = Llava.from_pretrained(folder, dtype, options.device).requires_grad_(False).eval()
    runs = {("ours", n): partial(ours.generate, ids, pixels, max_new_tokens=n) for n in (1, new)}
    answer = runs["ours", new]()                                     # (B, new)
    implementations = EXPERTS if ours.config.decoder.num_experts else EXPERTS[:1]
    if HAS_TRANSFORMERS:
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        theirs.to(options.device).eval()

        def generate(implementation: str, n: int) -> torch.Tensor:
            theirs.set_experts_implementation({"text_config": implementation})
            return theirs.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
                                   max_new_tokens=n, do_sample=False)[:, T:]

        runs |= {(side, n): partial(generate, side, n) for side in implementations for n in (1, new)}
        same = min((answer == runs[side, new]()).float().mean().item() for side in implementations)
        yield row(case, "tokens equal to transformers'", "", same, target=">= 1" if dtype == torch.float32 else "")
        # In bf16 a near-tie may fall either way, and then the rest of its row differs. So give transformers our answer:
        # how far is any of our tokens from its own choice at that position?
        with torch.no_grad():
            logits = theirs(input_ids=torch.cat([ids, answer], 1), pixel_values=pixels, logits_to_keep=new + 1).logits
        logits = logits[:, :-1].float()                              # (B, new, V)
        behind = (logits.amax(-1) - logits.gather(-1, answer[..., None])[..., 0]) / logits.std(-1)
        yield row(case, "our tokens' logits below transformers' best", "std", behind.max().item(), target="<= 0.1")

    products, _ = bare_products(prompt_products(ours, ids), dtype, options.device)
    products()
    seconds = take_turns(runs | {"products": products}, options)
    best = fastest({side: seconds[side, new] for side in implementations})
    against, speed = f"transformers, {best}", {}
    for side in ["ours", best] if best else ["ours"]:
        prompt, all_of_it = seconds[side, 1], seconds[side, new]
        speed["tokens per second", side] = [B * new / s for s in all_of_it]
        speed["prompt and first token", side] = [B / s for s in prompt]
        speed["further tokens", side] = [B * (new - 1) / (b - a) for a, b in zip(prompt, all_of_it)]
    for measure, target in [("tokens per second", ">= 2"), ("prompt and first token", ""), ("further tokens", "")]:
        yield row(case, measure, "/s", speed[measure, "ours"], speed.get((measure, best)), against, target)
    yield row(case, "prompt and first token", "/s", speed["prompt and first token", "ours"],
              [B / s for s in seconds["products"]], "bare matrix products")


# -----------------------------------------------------------------------------
# evaluate: many short questions about one image, as GQA and POPE have them, next to transformers' generate on the batch and
# to our own without the shared prefix

def bench_evaluate(size: dict, options: Config) -> Iterator[dict]:
    for sparse in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            ours = make_llava(size["student"], size["vision"], 0, sparse, options.device).requires_grad_(False).eval()
            ours.save_pretrained(folder)
            theirs = None
            if HAS_TRANSFORMERS:
                theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
                theirs.to(options.device).eval()
            for n_images, n in size["images"]:
                yield from compare_answering(f"{'E4T2' if sparse else 'dense'}, {n} questions per image", ours, theirs,
                                             n_images, n, size, options)


def compare_answering(case: str, ours: Llava, theirs: nn.Module | None, n_images: int, n: int, size: dict,
                      options: Config) -> Iterator[dict]:
    rng, vision, new = np.random.default_rng(0), size["vision"], size["new"]
    draw = lambda count: rng.integers(1, IMAGE_ID, count).tolist()
    start = draw(size["system"]) + [IMAGE_ID] * vision.patches
    prompts = [start + draw(rng.integers(*size["question"])) for _ in range(n_images * n)]
    pixels = torch.randn(n_images, 3, vision.image_size, vision.image_size, device=options.device)
    names = [[i] for i in range(n_images) for _ in range(n)]         # the images of each prompt
    images = pixels.repeat_interleave(n, dim=0)                      # (images n, 3, S, S)
    right = data.pad_right(prompts, 0).to(options.device)            # (n, T)
    left = data.pad_right([prompt[::-1] for prompt in prompts], 0).flip(1).to(options.device)

    def generate(implementation: str) -> torch.Tensor:
        theirs.set_experts_implementation({"text_config": implementation})
        return theirs.generate(input_ids=left, pixel_values=images, attention_mask=(left != 0).long(), max_new_tokens=new,
                               do_sample=False)[:, left.shape[1]:]

    runs = {"ours": lambda: prefix.generate(ours, prompts, names, dict(enumerate(pixels)), new),
            "without prefix": lambda: ours.generate(right, images, new)}
    implementations = EXPERTS if ours.config.decoder.num_experts else EXPERTS[:1]
    runs |= {side: partial(generate, side) for side in implementations}
    answers = {}
    seconds = take_turns({side: lambda side=side: answers.update({side: runs[side]()}) for side in runs}, options)
    for side in list(runs)[1:]:
        same = (answers["ours"] == answers[side]).all(1).float().mean().item()
        yield row(case, f"answers equal to those of {side}", "", same, target=">= 1")
    speed = {side: [len(prompts) / s for s in each] for side, each in seconds.items()}
    best = fastest({side: seconds[side] for side in implementations})
    target = {10: ">= 6", 31: ">= 12"}.get(n, "")
    yield row(case, "questions per second", "/s", speed["ours"], speed.get(best), f"transformers, {best}", target)
    yield row(case, "questions per second", "/s", speed["ours"], speed["without prefix"], "ours without prefix")


# -----------------------------------------------------------------------------
# data: pixels, padding

def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colors with a little noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


def stack_pixels(images: Iterable[Image.Image], side: int) -> torch.Tensor:
    return torch.stack([data.transform_image(image, side) for image in images])


def bench_data(size: dict, options: Config) -> Iterator[dict]:
    rng, side, name = np.random.default_rng(0), size["side"], "transformers"
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jpg" for i in range(size["images"])]
        for i, path in enumerate(paths):
            photo(rng, *[(640, 480), (480, 640), (640, 427), (500, 375)][i % 4]).save(path, quality=90)
        images = [data.load_image(path) for path in paths]
        runs = {("ours", "PIL"): lambda: stack_pixels(images, side),
                ("ours", "JPEG"): lambda: stack_pixels(map(data.load_image, paths), side)}
        if HAS_TRANSFORMERS:                                         # its fast path needs torchvision
            name = "LlavaImageProcessor" + ("" if importlib.util.find_spec("torchvision") else "Pil")
            crop = {"height": side, "width": side}
            processor = getattr(transformers, name)(do_pad=True, size={"shortest_edge": side}, crop_size=crop)
            theirs = partial(processor, return_tensors="pt")
            runs |= {("theirs", "PIL"): lambda: theirs(images).pixel_values,
                     ("theirs", "JPEG"): lambda: theirs([Image.open(path) for path in paths]).pixel_values}
            std = torch.tensor(data.CLIP_STD)[:, None, None]
            off = [(runs["ours", kind]() - runs["theirs", kind]()) * std for kind in ("PIL", "JPEG")]
            yield row("pixels", "largest difference, of 255", "", 255 * torch.stack(off).abs().max(), target="<= 1")
        rates = {key: [len(paths) / s for s in seconds] for key, seconds in take_turns(runs, options).items()}
    for kind in ("PIL", "JPEG"):
        yield row(f"pixels from {kind}", "images per second", "/s", rates["ours", kind], rates.get(("theirs", kind)),
                  name, ">= 1")
    yield from measure_padding(size)


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
    sampler = data.Sampler(lengths, batch_size=128)
    for micro in (2, 4, 8):
        share = {}
        for order in ("sampler", "random"):
            parts = []
            for step in range(min(200, sampler.steps_per_epoch)):
                rows = sampler.batch(step) if order == "sampler" else rng.choice(n, 128).tolist()
                parts += [part for rank in range(16) for part in data.micro_batches(rows, micro, rank, 16)]
            padded = sum(len(part) * lengths[part].max() for part in parts)
            share[order] = 1 - sum(lengths[part].sum() for part in parts) / padded
        yield row(f"micro-batch {micro}", "padding, of all tokens", "", share["sampler"], target="<= 0.05")
        yield row(f"micro-batch {micro}", "padding with rows in random order", "", share["random"])


# -----------------------------------------------------------------------------
# cache: a d2s step from the teacher cache, and what is lost by keeping k of the teacher's log-probs

def bench_cache(size: dict, options: Config) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        save_pair(size, folder, True, options.device)
        options = Config(options, folder=folder)
        runs = {side: cache_case("d2s", side, size, options) for side in ("online", "cached")}
        for side in ("online", "cached"):
            runs[side]()
        seconds = take_turns(runs, options)
        del runs
        case, against = f"d2s step, {size['dtype']}", "with the teacher"
        yield row(case, "time", "s", seconds["cached"], seconds["online"], against, "<= 0.6")
        ours, theirs = (peak_memory("cache", "d2s", side, options)["total"] for side in ("cached", "online"))
        yield row(case, "memory, all included", "B", ours, theirs, against)
    yield from loss_gap()


def cache_case(case: str, side: str, size: dict, options: Config) -> Callable:
    settings = dict(teacher_cache=f"{options.folder}/cache", teacher_top_k=64) if side == "cached" else {}
    return our_step(case, size, options, **settings)


@torch.no_grad()
def loss_gap() -> Iterator[dict]:
    """The KL on the tiny world's d2d rows, over all tokens and over k of them, before (align) and after d2d."""
    if not Path("out/tiny/d2d/config.json").is_file():
        print("(no out/tiny here: run speedrun.sh first for what k costs)")
        return
    config = train.configure([
        "--stage=d2d", "--student=out/tiny/align", "--teacher=out/tiny/teacher", "--data=data/tiny/train/d2d.json",
        "--image_dir=data/tiny/train/images", "--out_dir=none", "--max_length=128", "--dtype=float32", "--device=cpu"])
    teacher = Llava.from_pretrained(config.teacher).eval()
    for name in ("align", "d2d"):
        student = Llava.from_pretrained(f"out/tiny/{name}").eval()
        V, rows = student.config.decoder.vocab_size, train.open_rows(config, student)
        kl, tokens = {"online": 0.0, V: 0.0, 64: 0.0, 16: 0.0, 4: 0.0}, 0
        for batch in data.prefetch(rows, [range(i, i + 50) for i in range(0, 500, 50)],
                                   partial(train.collate_rows, llava=student.config, config=config), 0):
            features = train.image_features(student, batch, "d2d")
            states, _ = student.hidden_states(batch["input_ids"], features)
            logits = student.decoder.head(train.select(states, batch["head"]))     # (N, V)
            tokens += len(logits)
            for k in kl:
                if k == "online":
                    reference = train.teacher_reference(teacher, batch, features, config)
                    each = losses.distillation(logits, teacher.decoder.head(reference.hidden))
                else:
                    settings = Config(config, teacher_top_k=k)
                    outputs, _ = train.teacher_targets(teacher, batch, settings, V, torch.device("cpu"))
                    reference = train.cached_reference(batch | outputs, config, V)
                    each = losses.cached_distillation(logits, reference, slice(None))
                kl[k] += each.sum().item()
        for k in [k for k in kl if k != "online"]:
            case = f"tiny world, student after {name}, k = {k}" + " = V" * (k == V)
            yield row(case, "KL per token", "", kl[k] / tokens, kl["online"] / tokens, "online")
            yield row(case, "KL missing", "", (kl["online"] - kl[k]) / tokens, target="<= 1e-5" if k == V else "")
            yield row(case, "size per token", "bytes", 8.0 * k + 4)


# -----------------------------------------------------------------------------

# What is measured in a process of its own
CASES = {"loss": loss_case, "step": step_case, "signals": signal_case, "cache": cache_case}
SECTIONS = {"loss": bench_loss, "moe": bench_moe, "step": bench_step, "signals": bench_signals,
            "generate": bench_generate, "evaluate": bench_evaluate, "data": bench_data, "cache": bench_cache}


def main(argv: list[str]) -> None:
    options = load_config(DEFAULTS, argv)
    check_values(options, {"repeats": POSITIVE, "device": ["", "cpu", "cuda"],
                           "dtype": ["", "bfloat16", "float32"]})
    sections = options.sections.split(",") if options.sections else list(SECTIONS)
    for name in sections:
        if name not in SECTIONS:
            raise expected("--sections", name, f"one or more of {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; say --device=cpu")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.memory:
        case, side = options.memory.rsplit(",", 1)
        print(json.dumps(measure_memory(sections[0], case, side, options)))
        return

    packages = ["torch", "numpy", "pillow"] + ["transformers"] * HAS_TRANSFORMERS
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    info = Path("/proc/cpuinfo")
    cpu = info.read_text().partition("model name\t: ")[2].partition("\n")[0] if info.exists() else platform.machine()
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": options.device,
               "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none"}
    report = {"machine": machine, "versions": versions, "memory_env": MEMORY_ENV, "repeats": options.repeats,
              "quick": options.quick, "dtype": options.dtype, "sections": {}}
    print(", ".join(f"{key} {value}" for key, value in (machine | versions).items()))
    for section in sections:
        print(f"\n## {section}\n\n| case | measure | ours | peer | ours / peer | target | |\n" + "|---" * 7 + "|")
        rows = report["sections"][section] = []
        for each in SECTIONS[section](size_of(section, options), options):
            rows.append(each)
            print(show(each), flush=True)
        write_json(options.out, report)


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
