"""
One training loop for every stage of LLaVA-MoD.

    python train.py config/tiny/d2s.py --device=cpu                                     one process
    torchrun --standalone --nproc_per_node=2 train.py config/tiny/d2s.py --device=cpu   two, averaged by DDP over gloo
    torchrun --nproc_per_node=16 train.py config/d2s.py                                 sixteen A100s, nccl

Stages differ in three things only: what is trainable (TRAINABLE), which loss runs (`Objective`), and whether there is a
teacher. Everything else is shared.

    stage   loss                                        trainable                      paper
    align   cross-entropy                               adaptor                        section 3.2, eq. 5
    sft     cross-entropy                               decoder, adaptor               Table 6's baseline; trains the teacher
    d2d     KL(teacher || student)                      decoder, adaptor               eq. 6
    d2s     KL + cross-entropy + balance                experts, routers, adaptor      eq. 7
    pd      DPO against the teacher + balance           experts, routers, adaptor      eq. 8

Read top-down: 1. settings, 2. the loss of a micro-batch, 3. one optimizer step, 4. the loop, 5. setting up.

out_dir/ receives the student as a Hugging Face folder, log.jsonl (a record per step), run.json (settings and versions)
and state/ (what resuming needs). The same command resumes an interrupted run from its last save, bit for bit (on a GPU
with --deterministic; engine/resume.py). How a step is distributed over GPUs: engine/distributed.py.
"""
from configurator import Config, UserError, given_settings
from configurator import run as run_program                          # first: from here on, Ctrl-C ends in one line

import math
import runpy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
from engine import distributed, log, resume
from engine.chunked import chunked_loss
from engine.distributed import Dist
from engine.files import digest_of_folder, write_lines
from engine.hf import check_same_tokens, describe_llava, require_tokenizer, same_vision, stored_dtype
from engine.index import InstructionData, PreferenceData, RowData, digest, parse_sources
from engine.on_policy import is_on_policy, sample_answers
from engine.resume import Stop
from engine.settings import (FEATURE_WEIGHTS, INPUTS, MACHINE_LOCAL, MAY_CHANGE, check_no_effect, check_settings,
                             layer_numbers, may_change)
from engine.teacher_cache import RowsWithTeacher, TeacherCache, collate_with_teacher, fill, top_k
from losses import (PREFERENCE_LOSSES, TeacherReference, affinity_mse, at_least_fp32, cached_distillation,
                    cross_entropy, distillation, hidden_mse, relation_cosine, soften)
from model import Llava, LlavaConfig, flat, image_positions, valid_positions
from moe import SparseFFN, balance_loss, expert_counts, upcycle

# -----------------------------------------------------------------------------
# 1. Settings

DEFAULTS = dict(
    # what runs
    stage="",                   # align | sft | d2d | d2s | pd
    student="",                 # LLaVA folder to start from; or, for a new model, the next two
    vision="",                  # CLIP folder
    llm="",                     # Qwen folder: 1.5, 2, 2.5 or 3, dense
    teacher="",                 # LLaVA folder; d2d, d2s and pd need one
    template="",                # vicuna | chatml for a new model (empty: vicuna); a checkpoint records its own
    out_dir="",
    # data
    data="",                    # "a.json" or "a.json:0.5,b.jsonl:2": files, each with a weight
    image_dir="",
    skip_bad_rows=False,        # train without the rows that are wrong and list them in out_dir/bad_rows.jsonl; False: stop
    max_length=2048,            # positions per row, image positions included
    batch_size=128,             # rows (in pd: pairs) per step, over all ranks and micro-batches
    micro_batch_size=8,         # rows per rank and forward pass; the rest is gradient accumulation
    num_workers=0,              # processes that decode images, per rank
    val_rows=0,                 # rows that are never trained on; the loss on them goes to the log at the end,
    val_every=0,                # and after every so many steps
    # optimization
    learning_rate=2e-5,
    warmup_ratio=0.03,          # share of the steps; then cosine down to 0
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.98,
    eps=1e-6,
    grad_clip=0.0,              # largest gradient norm; 0: no clipping
    epochs=1,                   # passes over the data, or instead:
    max_steps=0,                # 0: as many as the epochs take
    # sparse student: how stage d2s upcycles a dense one
    num_experts=4,
    top_k=2,
    moe_layers="even",          # even | all | first_half | second_half | layer numbers, "0,2,5"
    norm_topk=True,             # divide the kept router weights by their sum; False is the paper's eq. 4
    balance_coef=0.01,
    train_dense_ffn=False,      # d2s and pd: also train the FFNs of the layers left dense, as the released code does
    # what is compared with the data and with the teacher: the weight of each loss (docs/signals.md)
    ce_weight=1.0,              # cross-entropy; in d2d 0.0 unless set (STAGE_DEFAULTS). d2s with all others 0.0 needs no teacher
    kd_weight=1.0,              # the token loss between student and teacher
    kd_loss="forward",          # forward (the paper) | reverse | jsd | mse (of standardized logits)
    kd_tokens="response",       # response | all (prompt and response; Table 7) | response+image (LLaVA-KD)
    kd_temperature=1.0,         # both logits are divided by it, the loss multiplied by its square
    kd_standardize=False,       # z-scores of the logits before any of them (LLaVADI's final recipe)
    kd_shift="aligned",         # aligned | late: the released code's mask, one position late; to measure what it costs
    jsd_beta=0.5,
    hidden_weight=0.0,          # last hidden states, through a trained map to the teacher's width
    hidden_tokens="response",   # response | all
    affinity_weight=0.0,        # cosines of image and response states
    relation_weight=0.0,        # cosines among image states
    on_policy=0.0,              # probability that a step distills the student's own answers instead of the data's
    on_policy_tokens=64,        # longest such answer; it may go beyond max_length
    on_policy_temperature=1.0,  # 0: greedy
    preference_loss="sigmoid",  # sigmoid (the paper's DPO) | kto_pair | ipo | hinge
    beta=0.1,
    teacher_cache="",           # folder that keeps the teacher's outputs (engine/teacher_cache.py); filled first if incomplete
    teacher_top_k=64,           # of a cached distribution: how many of the largest log-probs are kept per token
    # running
    seed=0,
    dtype="bfloat16",           # of the matrix products and the frozen weights; trainable weights are kept in fp32
    device="",                  # cpu | cuda; empty: cuda if there is one
    parallel="ddp",             # ddp | fsdp: what several ranks keep each (engine/distributed.py)
    deterministic=False,        # on a GPU: no atomic additions, whose order varies; slower, and bit for bit the same again
    compile=False,              # torch.compile each layer: minutes at the start, faster steps
    checkpointing=False,        # recompute each decoder layer in the backward pass instead of keeping its activations
    save_every=1000,            # steps between saves, of which the last two are kept
    log_every=10,               # steps between printed lines; log.jsonl has every step
    dry_run=False,              # only print what the run would take (tools/plan.py), and which of its data is here
)

# The trainable parameters of each stage: those whose name contains one of these.
TRAINABLE = {
    "align": ["adaptor."],
    "sft": ["adaptor.", "decoder."],
    "d2d": ["adaptor.", "decoder."],
    "d2s": ["adaptor.", ".ffn.experts.", ".ffn.router."],
    "pd": ["adaptor.", ".ffn.experts.", ".ffn.router."],
}
DENSE_FFN = [".ffn.gate_proj.", ".ffn.up_proj.", ".ffn.down_proj."]
STAGE_DEFAULTS = {"d2d": {"ce_weight": 0.0}}           # eq. 6 is the KL alone


# -----------------------------------------------------------------------------
# 2. The loss of one micro-batch: B rows of T positions, of which N go through the output head

def collate_rows(samples: list[dict], llava: LlavaConfig, config: Config) -> dict:
    collate = data.collate_pairs if config.stage == "pd" else data.collate
    return add_positions(collate(samples, llava.pad_token_id), llava, config)


def add_positions(batch: dict, llava: LlavaConfig, config: Config) -> dict:
    """The batch, and which of its positions each loss is about, as flat indices b * T + t (why: see model.py's `flat`).

    The one place where labels are shifted: what is predicted at t is the token at t+1.
    """
    ids = batch["input_ids"]                                         # (B, T)
    # A pad token may also end an answer, so what is in the mask is no padding, whatever its id.
    valid, image = valid_positions(ids, llava.pad_token_id) | batch["mask"], ids == llava.image_token_id
    response = shift_left(batch["mask"], False)                      # the next token belongs to a response
    distilled = response
    if config.teacher and config.stage != "pd":
        tokens = valid & ~image if config.kd_tokens == "all" else batch["mask"]
        # The released code masks distillation with labels that it has not shifted: one position late.
        distilled = tokens if config.kd_shift == "late" else shift_left(tokens, False)
        if config.kd_tokens == "response+image":
            distilled = distilled | image
    head = response | distilled                                      # only these N go through the output head
    n_images = 0 if batch["pixel_values"] is None else len(batch["pixel_values"]) * (2 if config.stage == "pd" else 1)
    return batch | {"valid": flat(valid), "image": image_positions(ids, n_images, llava),
                    "head": flat(head), "targets": shift_left(ids, 0)[head], "is_response": response[head],
                    "is_distilled": distilled[head],
                    "hidden": flat(valid if config.hidden_tokens == "all" else response)}


def select(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, T, D), flat positions (N,) -> (N, D)."""
    return states.flatten(0, 1).index_select(0, positions)


def shift_left(x: torch.Tensor, last: int | bool) -> torch.Tensor:
    """x[:, 1:], with `last` after it: (B, T) -> (B, T)."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], last)], dim=1)


def image_features(llava: Llava, batch: dict, stage: str) -> torch.Tensor:
    """(N_images, P, Dv). In pd the rejected rows show the chosen rows' images again: once through the ViT, then repeated."""
    features = llava.encode_images(batch["pixel_values"])
    return torch.cat([features, features]) if stage == "pd" else features


def sequence_logprobs(llava: Llava, states: torch.Tensor, batch: dict) -> torch.Tensor:
    """log p(response | prompt) of each row: (B, T, D) -> (B,)."""
    # Logits in fp32: rounded to bf16 they put the log-prob of an answer, a sum over its tokens, off by about 0.1.
    with torch.autocast(states.device.type, enabled=False):
        each, _ = chunked_loss(at_least_fp32(select(states, batch["head"])), llava.decoder.head_weight,
                               partial(token_logprob, targets=batch["targets"]))                 # (N,)
    rows, T, _ = states.shape
    return torch.zeros(rows, device=states.device).index_add(0, batch["head"] // T, each)


def token_logprob(logits: torch.Tensor, chunk: slice, targets: torch.Tensor) -> tuple[torch.Tensor, dict]:
    logprob = -cross_entropy(logits, targets[chunk])
    return logprob, {"logprob": logprob}


@torch.no_grad()
def teacher_reference(teacher: Llava, batch: dict, features: torch.Tensor, config: Config) -> TeacherReference:
    """What the student is compared with: the teacher's hidden states and head, or in pd its answers' log-probs."""
    states, _ = teacher.hidden_states(batch["input_ids"], features, batch["valid"], batch["image"])   # (B, T, D')
    if config.stage == "pd":
        return TeacherReference(sequence_logprobs=sequence_logprobs(teacher, states, batch))
    hidden, keep = select(states, batch["head"]), any(config[key] for key in FEATURE_WEIGHTS)
    return TeacherReference(states=states if keep else None, hidden=hidden, head=teacher.decoder.head_weight)


def cached_reference(batch: dict, config: Config, vocab_size: int) -> TeacherReference:
    """The same from the teacher cache, whose tensors the data loader has put into the batch."""
    if config.stage == "pd":
        return TeacherReference(sequence_logprobs=batch["teacher_logprobs"].T.flatten())
    return TeacherReference(top_ids=batch["teacher_ids"], top_logprobs=batch["teacher_logprobs"],
                            tail_logprob=batch["teacher_tail"], vocab_size=vocab_size)


def chunk_loss(logits: torch.Tensor, chunk: slice, teacher_logits: torch.Tensor | None = None, *, targets: torch.Tensor,
               is_response: torch.Tensor, is_distilled: torch.Tensor, teacher: TeacherReference | None, ce_weight: float,
               config: Config, total: dict[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the n tokens of a chunk add to the loss, and its parts: (n, V), (n, V') -> (n,), {name: (n,)}."""
    ce = cross_entropy(logits, targets[chunk]) * is_response[chunk]                              # eq. 5
    loss = ce_weight / total["response"] * ce
    if teacher is None:
        return loss, {"ce": ce}
    how = config.kd_loss, config.kd_temperature, config.kd_standardize, config.jsd_beta
    if teacher_logits is not None:
        kd = distillation(logits, teacher_logits, *how) * is_distilled[chunk]                    # eq. 6
    else:
        kd = cached_distillation(logits, teacher, chunk, *how) * is_distilled[chunk]
    return config.kd_weight * kd / total["distilled"] + loss, {"ce": ce, "kd": kd}               # eq. 7


class Objective(nn.Module):
    """The student together with its loss: the module that DDP or FSDP wraps.

    teacher_width: D', for the map of hidden states, which is trained with the student and not exported with it.
    """

    def __init__(self, student: Llava, config: Config, teacher_width: int = 0):
        super().__init__()
        self.student, self.config = student, config
        if config.hidden_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.hidden_map = nn.Sequential(nn.Linear(student.config.decoder.n_embd, teacher_width), nn.GELU(),
                                                nn.Linear(teacher_width, teacher_width))
            self.hidden_map.to(student.adaptor.linear_1.weight.device)

    def forward(self, batch: dict, features: torch.Tensor, teacher: TeacherReference | None,
                total: dict[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One micro-batch's share of the global loss, of each part of it by name, and the routers' "counts".

        total: what the sums are divided by, counted over the *global* batch (`count_batch`). Added up over micro-batches
        and ranks, the shares are the means over the global batch.
        """
        config, student, input_ids = self.config, self.student, batch["input_ids"]
        states, routings = student.hidden_states(input_ids, features, batch["valid"], batch["image"])      # (B, T, D)
        is_image = input_ids == student.config.image_token_id        # (B, T)

        if config.stage == "pd":
            chosen, rejected = sequence_logprobs(student, states, batch).chunk(2)                # (B,) each
            ref_chosen, ref_rejected = teacher.sequence_logprobs.chunk(2)
            each = PREFERENCE_LOSSES[config.preference_loss](chosen, rejected, ref_chosen, ref_rejected, config.beta)
            loss = each.sum() / total["pairs"]                                                   # eq. 8
            margin = (chosen - ref_chosen) - (rejected - ref_rejected)
            sums = {"preference": each, "margin": margin, "accuracy": (margin > 0).float(), "chosen": chosen,
                    "rejected": rejected}
            parts = {name: value.sum() / total["pairs"] for name, value in sums.items()}
        else:
            reference = teacher if config.kd_weight else None
            loss = partial(
                chunk_loss, targets=batch["targets"], is_response=batch["is_response"], is_distilled=batch["is_distilled"],
                teacher=reference, config=config, total=total,
                ce_weight=0.0 if "sampled" in batch else config.ce_weight)                       # sampled: not data
            each, sums = chunked_loss(select(states, batch["head"]), student.decoder.head_weight, loss, teacher=reference)
            loss = each.sum()
            parts = {name: value.sum() / total["response" if name == "ce" else "distilled"] for name, value in sums.items()}
            if "sampled" in batch:                                   # its own answers: their cross-entropy is no error
                del parts["ce"]

        if config.hidden_weight:
            each = hidden_mse(self.hidden_map(select(states, batch["hidden"])), select(teacher.states, batch["hidden"]))
            parts["hidden"] = each.sum() / total["hidden"]
            loss = loss + config.hidden_weight * parts["hidden"]
        if config.affinity_weight:
            each = affinity_mse(states, teacher.states, is_image, shift_left(batch["mask"], False))      # (B,)
            parts["affinity"] = each.sum() / max(total["image_rows"], 1)
            loss = loss + config.affinity_weight * parts["affinity"]
        if config.relation_weight:
            each = relation_cosine(states, teacher.states, is_image)                             # (B,)
            parts["relation"] = each.sum() / max(total["image_rows"], 1)
            loss = loss + config.relation_weight * parts["relation"]
        if routings:
            rows, T = input_ids.shape
            balance = sum(balance_loss(routing, batch["valid"] // T, rows).sum() for routing in routings)   # over layers, rows
            loss = loss + config.balance_coef * balance / total["rows"]
            parts["balance"] = balance / total["rows"]
            is_image_N = is_image.flatten().index_select(0, batch["valid"])
            parts["counts"] = torch.stack([expert_counts(routing, is_image_N) for routing in routings])   # (layers, 2, E)
        return loss, {name: value.detach() for name, value in parts.items()}


# -----------------------------------------------------------------------------
# 3. One optimizer step

@dataclass
class Run:
    """What a step and the loop need; made by `setup`."""
    config: Config
    dist: Dist
    student: Llava
    teacher: Llava | None                   # None: no teacher, or its outputs come from the cache
    cache: TeacherCache | None
    objective: nn.Module                    # Objective, wrapped by DDP or sharded by FSDP where there are several ranks
    optimizer: torch.optim.Optimizer
    trainable: dict[str, nn.Parameter]      # the one list of what is optimized, clipped, saved and restored
    dataset: RowData | None = None
    sampler: data.Sampler | None = None
    held_out: list[dict] | None = None      # this rank's micro-batches of the held-out rows
    batches: Iterator[list[dict]] | None = None     # this rank's micro-batches of each step
    first_step: int = 0                     # steps already done
    steps: int = 0

    def describe(self, step: int) -> list[str]:
        """File and row of everything in the global batch of a step."""
        return [self.dataset.describe(row) for row in self.sampler.batch(step - 1)]


def autocast(config: Config, device: torch.device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")


def reference_of(run: Run, batch: dict, features: torch.Tensor) -> TeacherReference | None:
    """The teacher's side of a micro-batch. A frozen ViT that both share has seen the images already."""
    if run.cache is not None:
        return cached_reference(batch, run.config, run.cache.vocab_size)
    if run.teacher is None:
        return None
    if run.teacher.vision is not run.student.vision:
        features = image_features(run.teacher, batch, run.config.stage)
    return teacher_reference(run.teacher, batch, features, run.config)


def train_step(run: Run, micro_batches: list[dict], total: dict[str, int], lr: float,
               step: int = 0) -> tuple[float, dict[str, torch.Tensor], float]:
    """Forward, backward, clip, update -> loss, its parts and the gradient norm, all of the global batch.

    total: see `Objective`. Raises UserError, before the weights are touched, if loss or gradient is not finite.
    """
    config, dist = run.config, run.dist
    for group in run.optimizer.param_groups:
        group["lr"] = lr

    loss_sum, sums = torch.zeros((), device=dist.device), {}
    for i, batch in enumerate(micro_batches):
        batch = to_device(dist.device, batch)
        is_last = i == len(micro_batches) - 1                        # gradients are averaged over ranks once per step
        with nullcontext() if is_last else distributed.no_sync(run.objective):
            with autocast(config, dist.device):
                features = image_features(run.student, batch, config.stage)
                loss, parts = run.objective(batch, features, reference_of(run, batch, features), total)
            # Outside of autocast, which would compute the gradients of fp32 products, the router's, in bf16.
            (loss * dist.world_size).backward()                      # the average over ranks becomes the sum
        loss_sum += loss.detach()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.double()          # as exact as a sum over ranks
    loss = dist.all_reduce(loss_sum).item()
    parts = {name: dist.all_reduce(value) for name, value in sums.items()}

    grads = [parameter.grad for parameter in run.trainable.values()]
    grad_norm = distributed.full(nn.utils.get_total_norm(grads))
    if not math.isfinite(loss) or not grad_norm.isfinite():
        with dist.sync_errors():
            raise UserError(log.not_finite(step, loss, grad_norm.item(), parts, run.trainable, run.describe(step), dist))
    if config.grad_clip:
        nn.utils.clip_grads_with_norm_(run.trainable.values(), config.grad_clip, grad_norm)
    run.optimizer.step()
    distributed.zero_grad(run.objective, run.optimizer)
    return loss, parts, grad_norm.item()


def to_device(device: torch.device, batch: dict) -> dict:
    return {key: None if value is None else value.to(device, non_blocking=True) for key, value in batch.items()}


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then half a cosine down to 0. Steps count from 0."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def count_batch(micro_batches: list[dict], config: Config) -> dict[str, int]:
    """This rank's part of every count that a sum is divided by, and of all tokens."""
    total = Counter({"response": 0, "distilled": 0, "hidden": 0, "image_rows": 0, "rows": 0, "pairs": 0, "tokens": 0})
    for batch in micro_batches:
        rows, T = batch["input_ids"].shape
        total.update({"response": int(batch["is_response"].sum()), "distilled": int(batch["is_distilled"].sum()),
                      "hidden": len(batch["hidden"]), "image_rows": len((batch["image"] // T).unique()), "rows": rows,
                      "pairs": rows // 2 if config.stage == "pd" else 0, "tokens": len(batch["valid"])})
    return dict(total)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """The loss and its parts on the held-out rows, as if they were one batch."""
    config, dist, sums = run.config, run.dist, {}
    total = dist.sum_counts(count_batch(run.held_out, config))
    for batch in run.held_out:
        batch = to_device(dist.device, batch)
        with autocast(config, dist.device):
            features = image_features(run.student, batch, config.stage)
            loss, parts = run.objective(batch, features, reference_of(run, batch, features), total)
        for name, value in ({"loss": loss} | parts).items():
            sums[name] = sums.get(name, 0) + value.double()
    distributed.reshard(run.objective)
    return {f"val_{name}": dist.all_reduce(value).item() for name, value in sums.items() if name != "counts"}


# -----------------------------------------------------------------------------
# 4. The loop

def main(argv: list[str], stop: Stop | None = None) -> None:
    config = configure(argv)
    if config.dry_run:
        return runpy.run_module("tools.plan")["main"](argv)
    stop = stop or Stop()
    dist = distributed.init_distributed(config.device, tf32=config.dtype == "float32", deterministic=config.deterministic,
                                        patience=600 if config.compile else 60)                  # ranks compile at their own pace
    out_dir = Path(config.out_dir)
    run = setup(config, dist)
    if run is None:
        return

    began, stop.can_wait, unsaid = time.time(), True, []             # unsaid: the records since the last line
    warnings = log.Warnings(resume.first_losses(out_dir, log.WINDOW), run.student.config.decoder.sparse_layers)
    for step, micro_batches in enumerate(stop.watch(run.batches), start=run.first_step + 1):
        step_began = time.time()
        # Count the global batch before the first forward pass; the ranks' votes to stop travel with the counts.
        answers = {"answers": 0, "answer_tokens": 0, "unfinished": 0}
        if is_on_policy(config, step) and micro_batches:
            try:
                micro_batches, answers = sample_step(run, micro_batches, step)
            except UserError as error:                               # a vote to stop, as of data that cannot be read
                stop.error, micro_batches = error, []
        generation = time.time() - step_began
        total = dist.sum_counts(count_batch(micro_batches, config) | answers | stop.votes())
        if any(total[vote] for vote in stop.votes()):
            if step - 1 > run.first_step and (step - 1) % config.save_every:
                save_state(run, step - 1)
            stop.end(total, step - 1, dist.rank)

        lr = learning_rate(step - 1, run.steps, config)
        loss, parts, grad_norm = train_step(run, micro_batches, total, lr, step)

        record = log.record(step, loss, parts, lr, grad_norm, total["tokens"], time.time() - step_began)
        if config.on_policy:
            record |= log.answers(total, generation)
        if dist.device.type == "cuda":
            record["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)                # so far, of this rank's tensors
        is_validated = run.held_out and (step == run.steps or config.val_every and step % config.val_every == 0)
        if is_validated:
            record |= validate(run)
        if dist.rank == 0:
            resume.append_log(out_dir, record)
            unsaid.append(record)
            for line in warnings.after(record, parts):
                stop.say(line)
            if step % config.log_every == 0 or step == run.steps:
                stop.say(log.line(unsaid, run.steps, (time.time() - began) / (step - run.first_step)))
                unsaid.clear()
            if is_validated:
                stop.say(log.held_out_line(record, run.steps))
        if step % config.save_every == 0 or step == run.steps:
            save_state(run, step)
            export(run)

    if run.first_step == run.steps:                                  # interrupted between the last save and the export
        export(run)
    with dist.sync_errors():
        if dist.rank == 0:
            resume.finish(out_dir)
            stop.say(f"{config.stage} done: {out_dir}")


def sample_step(run: Run, micro_batches: list[dict], step: int) -> tuple[list[dict], dict[str, int]]:
    """All micro-batches of an on-policy step with the student's own answers, and the counts for the log."""
    rows = data.micro_batches(run.sampler.batch(step - 1), run.config.micro_batch_size, run.dist.rank, run.dist.world_size)
    sampled, total = [], Counter()
    for batch, numbers in zip(micro_batches, rows):
        # Eager under compile: a cache that grows would be compiled again for every length, up to dynamo's limit.
        with autocast(run.config, run.dist.device), torch.compiler.set_stance("force_eager"):
            batch, counts = sample_answers(run.student, batch, numbers, run.config, step)
        sampled.append(add_positions(batch, run.student.config, run.config))
        total.update(counts)
    return sampled, dict(total)


def save_state(run: Run, step: int) -> None:
    """What resuming needs."""
    weights = distributed.gather(run.trainable, run.dist)
    adam = distributed.gather_adam(run.trainable, run.optimizer, run.dist)
    with run.dist.sync_errors():
        if run.dist.rank == 0:
            resume.write_state(Path(run.config.out_dir), {"step": step, "weights": weights, "adam": adam})


def export(run: Run) -> None:
    """What others use: the student as a Hugging Face folder."""
    weights = distributed.gather(dict(run.student.named_parameters()), run.dist)
    with run.dist.sync_errors():
        if run.dist.rank == 0:
            resume.write_model(Path(run.config.out_dir), run.student, getattr(torch, run.config.dtype), weights)


# -----------------------------------------------------------------------------
# 5. Setting up

def configure(argv: list[str]) -> Config:
    """Defaults < the stage's own defaults < config files < flags, checked."""
    given = given_settings(DEFAULTS, argv)
    defaults = DEFAULTS | STAGE_DEFAULTS.get(given.get("stage"), {})
    config = Config(defaults | given)
    check_settings(config)
    check_no_effect(config, defaults, given)
    return config


def setup(config: Config, dist: Dist) -> Run | None:
    """Everything before the first step; None if this run is finished already. An error on any rank ends all of them."""
    say = print if dist.rank == 0 else lambda *_: None
    dist.assert_same({key: value for key, value in config.items() if key not in MACHINE_LOCAL} | {"torch": torch.__version__})
    out_dir, first_step = Path(config.out_dir), 0
    finished, state_file, note = dist.broadcast_from_rank0(
        lambda: resume.begin_or_resume(out_dir, config, may_change(config), INPUTS))
    if finished:
        say(f"{out_dir}: this run is finished already; nothing to do")
        return None

    # Student, data and their order, teacher or its cache
    dtype = getattr(torch, config.dtype)
    with dist.sync_errors():
        student = open_student(config, dist.device)                  # straight to its GPU: eight ranks share the host's memory
        choose_trainable(student, config, dtype)
        student.decoder.checkpointing = config.checkpointing
    dataset = dist.local_rank0_first(lambda: open_rows(config, student))
    with dist.sync_errors():
        digests = fingerprints(config, dataset) if dist.local_rank == 0 else {}
    digests = dist.assert_same(digests)
    digests = dist.broadcast_from_rank0(lambda: resume.check_inputs(out_dir, config, digests))
    collate = partial(collate_rows, llava=student.config, config=config)
    with dist.sync_errors():
        held_out = dataset.held_out(config.val_rows)
        sampler = data.Sampler(dataset.lengths, config.batch_size, config.seed, dataset.sources, held_out)
        data.micro_batches(sampler.batch(0), config.micro_batch_size, dist.rank, dist.world_size)   # does it divide?
    steps = config.max_steps or config.epochs * sampler.steps_per_epoch
    rows, teacher, cache = dataset, None, None
    if config.teacher_cache:
        needed = np.union1d(sampler.visited(steps), held_out)
        cache = open_cache(config, student, dataset, needed, digests, collate, dist)
        rows, collate = RowsWithTeacher(dataset, cache), partial(collate_with_teacher, collate=collate)
    elif config.teacher:
        with dist.sync_errors():
            teacher = open_teacher(config, student, dtype, dist.device)
    if config.compile:
        for layer in filter(lambda module: isinstance(module, SparseFFN), student.modules()):    # its shapes depend on the
            layer.forward = torch.compiler.disable(layer.forward, recursive=False)               # data: only its experts
        for block in [*student.vision.blocks, *student.decoder.blocks, *(teacher.decoder.blocks if teacher else [])]:
            block.compile(dynamic=True)                              # rows have all lengths

    # The place in the data
    with dist.sync_errors():
        state = None
        if state_file:
            state = resume.read_state(state_file)
            first_step = state["step"]
        held_out = held_out_batches(rows, dataset.lengths, held_out, collate, config, dist)
    for line in [*dataset.notes, *filter(None, [note]), *log.introduction(config, student, teacher, len(dataset), dist.world_size)]:
        say(line)
    say(f"{steps} steps" + (f", resuming after step {first_step}" if first_step else ""))

    # Over the ranks, and back to the saved state
    teacher_width = teacher.config.decoder.n_embd if teacher else 0
    objective, optimizer, trainable = distributed.parallelize(
        Objective(student, config, teacher_width), dist, config.parallel, dtype, lr=config.learning_rate,
        betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay)
    with dist.sync_errors():
        if state:
            resume.check_state(state_file, state, trainable)
            distributed.restore(trainable, optimizer, state["weights"], state["adam"])
        if dist.rank == 0:
            resume.lock(out_dir, first_step)
            resume.go_back(out_dir, first_step)
            # All of MAY_CHANGE, whatever the loss: a run's digest must stay what it is in the states that it has saved.
            resume.write_run(out_dir, config, [*MAY_CHANGE, *INPUTS], digests, dist.world_size)
            if dataset.wrong:
                write_lines(out_dir / "bad_rows.jsonl", dataset.wrong)
    batches = data.batches(rows, sampler, config.micro_batch_size, dist.rank, dist.world_size, first_step, steps,
                           config.num_workers, collate, pin_memory=dist.device.type == "cuda")
    return Run(config, dist, student, teacher, cache, objective, optimizer, trainable, dataset, sampler, held_out, batches,
               first_step, steps)


def open_student(config: Config, device: torch.device | str = "cpu") -> Llava:
    if config.student:
        student = Llava.from_pretrained(config.student, device=device)
    else:
        student = Llava.from_parts(config.vision, config.llm, config.seed, config.template or "vicuna", device)
    folder = config.student or config.llm
    require_tokenizer(student, folder)
    if student.config.pad_token_id is None:
        raise UserError(f"{folder}: config.json names no pad_token_id, which batches of rows of unequal length need")
    sparse = bool(student.config.decoder.num_experts)
    if config.stage == "d2s" and not sparse:
        make_sparse(student, config)
    if config.stage == "pd" and not sparse:
        raise UserError(f"{folder}: is dense, and stage pd trains experts; run stage d2s first")
    return student


def make_sparse(student: Llava, config: Config) -> None:
    upcycle(student, config.num_experts, config.top_k, layer_numbers(config), config.norm_topk, config.seed)


def choose_trainable(student: Llava, config: Config, dtype: torch.dtype) -> None:
    """Mark the stage's trainable parameters (kept in fp32) and freeze the others (kept in `dtype`)."""
    patterns = TRAINABLE[config.stage] + (DENSE_FFN if config.train_dense_ffn and config.stage in ("d2s", "pd") else [])
    for name, parameter in student.named_parameters():
        parameter.requires_grad = not name.startswith("vision.") and any(pattern in name for pattern in patterns)
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(stored_dtype(name, dtype))
    if config.train_dense_ffn and len(student.decoder.config.sparse_layers) == student.decoder.config.n_layer:
        raise UserError("train_dense_ffn=True: has no effect, since every layer of this student is sparse; leave it out")


def open_rows(config: Config, student: Llava) -> RowData:
    dataset = PreferenceData if config.stage == "pd" else InstructionData
    return dataset(parse_sources(config.data), config.image_dir, student.tokenizer, student.config.template,
                   student.config.image_tokens, student.config.vision.image_size, config.max_length, config.skip_bad_rows)


def held_out_batches(rows: torch.utils.data.Dataset, lengths: np.ndarray, held_out: np.ndarray, collate: Callable,
                     config: Config, dist: Dist) -> list[dict]:
    """This rank's micro-batches of the held-out rows, read once and kept; every rank has equally many."""
    if len(held_out) % dist.world_size:
        raise UserError(f"val_rows={len(held_out)} cannot be divided among {dist.world_size} ranks; try val_rows="
                        f"{math.ceil(len(held_out) / dist.world_size) * dist.world_size}")
    if not len(held_out):
        return []
    by_length = held_out[lengths[held_out].argsort(kind="stable")]
    per_rank = math.ceil(len(held_out) / (dist.world_size * config.micro_batch_size))
    groups = [group.tolist() for group in np.array_split(by_length, per_rank * dist.world_size)]
    return list(data.prefetch(rows, groups[dist.rank::dist.world_size], collate, config.num_workers))


def open_teacher(config: Config, student: Llava, dtype: torch.dtype, device: torch.device) -> Llava:
    """Frozen, in eval mode, in the dtype of the matrix products."""
    teacher = Llava.from_pretrained(config.teacher, dtype=dtype, device=device).requires_grad_(False).eval()
    check_same_tokens(student, teacher, config.student or config.llm, config.teacher)
    if same_vision(student, teacher):
        teacher.vision = student.vision                              # one tower in memory, one pass per image
    return teacher


def open_cache(config: Config, student: Llava, dataset: RowData, needed: np.ndarray, digests: dict[str, str],
               collate: Callable, dist: Dist) -> TeacherCache:
    """The teacher's outputs for the `needed` rows. Where some are missing, the teacher is loaded, run on those and freed."""
    cache_key = {"data": dataset.fingerprint, "answers": "preferences" if config.stage == "pd" else "distributions",
                 "dtype": config.dtype, "teacher": digests.get("teacher"), "vocabulary": None}
    if config.stage != "pd":
        cache_key |= {key: config[key] for key in ("kd_tokens", "kd_shift", "kd_temperature", "kd_standardize")}
        cache_key |= {"top_k": config.teacher_top_k}
    if Path(config.teacher).is_dir():
        vocab_size = describe_llava(Path(config.teacher)).config.decoder.vocab_size
        cache_key |= {"vocabulary": min(student.config.decoder.vocab_size, vocab_size)}
    cache = dist.broadcast_from_rank0(lambda: TeacherCache(config.teacher_cache, len(dataset), cache_key, needed))
    missing = dist.broadcast_from_rank0(cache.claim_missing)
    if missing:
        with dist.sync_errors(), autocast(config, dist.device):
            teacher = open_teacher(config, student, getattr(torch, config.dtype), dist.device)
            targets = partial(teacher_targets, teacher, config=config, vocab_size=cache.vocab_size, device=dist.device)
            fill(cache, missing, dataset, targets, collate, config.micro_batch_size, config.num_workers, dist.rank,
                 dist.world_size)
    cache.release()
    with dist.sync_errors():
        cache.check(dist.rank, dist.world_size)
    return cache


@torch.no_grad()
def teacher_targets(teacher: Llava, batch: dict, config: Config, vocab_size: int,
                    device: torch.device) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What the cache keeps of a batch: tensors whose entries are ordered by row, and the number of entries of each row."""
    rows, T = batch["input_ids"].shape
    lengths = (batch["head"] // T).bincount(minlength=rows).tolist()
    batch = to_device(device, batch)
    features = image_features(teacher, batch, config.stage)
    reference = teacher_reference(teacher, batch, features, config)
    if config.stage == "pd":
        logprobs = reference.sequence_logprobs.view(2, -1).T                                     # (B, 2)
        return {"teacher_logprobs": logprobs}, [1] * len(logprobs)
    parts = []
    for hidden in reference.hidden.split(256):                       # tokens whose logits exist at a time
        logits = soften(teacher.decoder.head(hidden)[:, :vocab_size], config.kd_temperature, config.kd_standardize)
        parts.append(top_k(logits, min(config.teacher_top_k, vocab_size)))
    ids, logprobs, tail = (torch.cat(part) for part in zip(*parts))
    return {"teacher_ids": ids.int(), "teacher_logprobs": logprobs, "teacher_tail": tail}, lengths


def fingerprints(config: Config, dataset: RowData) -> dict[str, str]:
    """A digest of the content of each input."""
    found = {"data": digest([dataset.fingerprint, dataset.sources])}    # sources: the rows and weight of each file
    for key in ("student", "teacher", "vision", "llm"):
        if config[key] and Path(config[key]).is_dir():               # with a teacher_cache, the teacher may be gone
            found[key] = digest_of_folder(config[key])
    return found


if __name__ == "__main__":
    stop = Stop()
    stop.listen()
    try:
        run_program(partial(main, stop=stop), __doc__, DEFAULTS)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
