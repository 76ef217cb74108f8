"""
One training loop for every stage of LLaVA-MoD.

    python train.py config/tiny/d2s.py --device=cpu                                     one process
    torchrun --standalone --nproc_per_node=2 train.py config/tiny/d2s.py --device=cpu   two, averaged by DDP over gloo
    torchrun --nproc_per_node=16 train.py config/d2s.py                                 sixteen A100s, nccl

Stages differ in three things only: what learns (TRAINABLE), which loss runs (`Objective`), and whether a teacher stands
beside the student. All else is shared, and stands below in the order in which it happens.

    stage   loss                                        learns                         paper
    align   cross-entropy                               adaptor                        section 3.2, eq. 5
    sft     cross-entropy                               LLM, adaptor                   Table 6's baseline; trains the teacher
    d2d     KL(teacher || student)                      LLM, adaptor                   eq. 6
    d2s     KL + cross-entropy + balance                experts, routers, adaptor      eq. 7
    pd      DPO against the teacher + balance           experts, routers, adaptor      eq. 8

out_dir/ receives the student as a Hugging Face folder, log.jsonl (a record per step), run.json (settings and versions)
and state/ (what resuming needs). The same command continues an interrupted run where its last save was, bit for bit
(resume.py); how a step is spread over GPUs stands in parallel.py.
"""
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import data
from configurator import Config, UserError, load_config, run
from engine import distributed, resume
from engine.chunked import CHUNK, chunked_loss
from engine.files import read_json
from engine.hf import describe_llava, describe_parts
from engine.resume import Stop
from losses import PREFERENCES, cross_entropy, forward_kl, forward_kl_top_k
from model import Llava
from moe import balance_loss, expert_counts, upcycle
from engine.teacher_cache import RowsWithTeacher, TeacherCache, collate_with_teacher, digest_of_folder, fill, top_k

DEFAULTS = dict(
    # what runs
    stage="",                   # align | sft | d2d | d2s | pd
    student="",                 # LLaVA folder to start from; or, for a new model, the next two
    vision="",                  # CLIP folder
    llm="",                     # Qwen1.5/Qwen2 folder
    teacher="",                 # LLaVA folder; d2d, d2s and pd need one
    template="",                # vicuna | chatml for a new model (empty: vicuna); a checkpoint knows its own
    out_dir="",
    # data
    data="",                    # "a.json" or "a.json:0.5,b.jsonl:2": files, each with a weight
    image_dir="",
    max_length=2048,            # positions per row, image positions included
    batch_size=128,             # rows (in pd: pairs) per step, over all ranks and micro-batches
    micro_batch_size=8,         # rows per rank and pass; the rest is gradient accumulation
    num_workers=0,              # processes that decode images, per rank
    # optimisation
    learning_rate=2e-5,
    warmup_ratio=0.03,          # share of the steps; then cosine down to 0
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.98,
    eps=1e-6,
    grad_clip=0.0,              # largest gradient norm; 0: no clipping
    epochs=1,
    max_steps=0,                # 0: as many as the epochs take
    # sparse student
    num_experts=4,
    top_k=2,
    moe_layers="even",          # even | all | first_half | second_half | layer numbers, "0,2,5"
    norm_topk=True,             # divide the kept router weights by their sum; False is the paper's eq. 4
    balance_coef=0.01,
    train_dense_ffn=False,      # d2s and pd: also train the FFNs of the layers left dense, as the released code does
    # losses
    kd_weight=1.0,
    ce_weight=1.0,              # in d2s; d2d is the KL alone. With kd_weight=0.0, d2s needs no teacher
    kd_tokens="response",       # response | all: distil the prompt's text too (Table 7)
    preference_loss="sigmoid",  # sigmoid (the paper's DPO) | kto_pair | ipo | hinge
    beta=0.1,
    teacher_cache="",           # folder that keeps what the teacher says (teacher_cache.py); filled first if it is not yet
    teacher_top_k=64,           # of a cached distribution: how many of the largest log-probs are kept per token
    # running
    seed=0,
    dtype="bfloat16",           # of the matrix products and the frozen weights; what learns is kept in fp32
    device="",                  # cpu | cuda; empty: cuda if there is one
    parallel="ddp",             # ddp | fsdp: what several ranks keep each (parallel.py)
    compile=False,              # torch.compile each layer: minutes at the start, faster steps
    checkpointing=False,        # compute each decoder layer twice instead of keeping its insides for the backward pass
    save_every=1000,            # steps between saves, of which the last two are kept
    log_every=10,               # steps between printed lines; log.jsonl has every step
    dry_run=False,              # only say what the run would take (plan.py), and what of it is on this disk
)

# What learns in each stage: parameters whose name holds one of these.
TRAINABLE = {
    "align": ["adaptor."],
    "sft": ["adaptor.", "decoder."],
    "d2d": ["adaptor.", "decoder."],
    "d2s": ["adaptor.", ".ffn.experts.", ".ffn.router."],
    "pd": ["adaptor.", ".ffn.experts.", ".ffn.router."],
}
DENSE_FFN = [".ffn.gate_proj.", ".ffn.up_proj.", ".ffn.down_proj."]
WITH_TEACHER = ["d2d", "d2s", "pd"]
# Settings that may differ when an interrupted run goes on.
MAY_CHANGE = ["out_dir", "device", "micro_batch_size", "num_workers", "parallel", "compile", "checkpointing", "save_every",
              "log_every", "dry_run"]
# Settings that may differ from machine to machine. Where they name files, it is the content that has to be the same.
MACHINE_LOCAL = ["student", "teacher", "vision", "llm", "data", "image_dir", "teacher_cache", "device", "num_workers"]


# -----------------------------------------------------------------------------
# The loss of one micro-batch. In sums: what divides them is counted over the whole global batch, beforehand.

def predicted(batch: dict, llava: Llava, config: Config) -> torch.Tensor:
    """(B, T-1) bool: true at t where the token at t+1 is one to learn from. The one place where labels are shifted."""
    if config.kd_tokens == "response" or not config.teacher or config.stage == "pd":
        return batch["mask"][:, 1:]
    is_text = llava.valid_positions(batch["input_ids"]) & (batch["input_ids"] != llava.config.image_token_id)
    return is_text[:, 1:]                                            # of prompt and response


def summed_logprobs(llava: Llava, hidden: torch.Tensor, targets: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """log p(response | prompt) of each row: (N, D), (N,), (B, T-1) -> (B,)."""
    def logprob(logits: torch.Tensor, part: slice) -> tuple:
        each = -cross_entropy(logits, targets[part])
        return each, [each]

    rows = torch.where(where)[0]                                     # (N,) the row that each response token is in
    each, _ = chunked_loss(hidden, llava.decoder.head_weight, logprob)  # (N,)
    return torch.zeros(len(where), device=hidden.device).index_add(0, rows, each)


def image_features(llava: Llava, batch: dict, stage: str) -> torch.Tensor:
    """(N, P, Dv). In pd the rejected rows show the chosen rows' images again: once through the ViT, then repeated."""
    features = llava.encode_images(batch["pixel_values"])
    return torch.cat([features, features]) if stage == "pd" else features


def response_states(llava: Llava, batch: dict, features: torch.Tensor,
                    config: Config) -> tuple[torch.Tensor, torch.Tensor, list]:
    """The hidden states that predict a token to learn from (N, D), where they stand (B, T-1), and the routings.

    The output head, whose V columns are most of a small model's work, sees these positions only.
    """
    hidden, routings = llava.hidden_states(batch["input_ids"], features)
    where = predicted(batch, llava, config)
    return hidden[:, :-1][where], where, routings


@torch.no_grad()
def teacher_reference(teacher: Llava, batch: dict, features: torch.Tensor, config: Config) -> Callable | torch.Tensor:
    """What the objective compares the student with.

    In pd the teacher's log-probs of the answers, (2B,). Else a function of a few tokens' logits and which tokens they
    are, (n, V) and a slice of the N, that gives their KL from the teacher, (n,): like the student's, the teacher's logits
    are made only where and when they are needed.
    """
    hidden, where, _ = response_states(teacher, batch, features, config)
    if config.stage == "pd":
        return summed_logprobs(teacher, hidden, batch["input_ids"][:, 1:][where], where)

    def kl_from_teacher(logits: torch.Tensor, part: slice) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher.decoder.head(hidden[part])      # (n, V')
        return forward_kl(logits, teacher_logits)
    return kl_from_teacher


@torch.no_grad()
def teacher_targets(teacher: Llava, batch: dict, config: Config, vocabulary: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What teacher_cache.py keeps of a batch: tensors, their lines row after row, and how many lines each row has."""
    features = image_features(teacher, batch, config.stage)
    if config.stage == "pd":
        chosen_and_rejected = teacher_reference(teacher, batch, features, config).view(2, -1).T            # (B, 2)
        return {"teacher_logprobs": chosen_and_rejected}, [1] * len(chosen_and_rejected)
    hidden, where, _ = response_states(teacher, batch, features, config)
    k = min(config.teacher_top_k, vocabulary)
    parts = [top_k(teacher.decoder.head(some)[:, :vocabulary], k) for some in hidden.split(CHUNK[hidden.device.type])]
    ids, logprobs, tail = (torch.cat(part) for part in zip(*parts))
    return ({"teacher_ids": ids.int(), "teacher_logprobs": logprobs, "teacher_tail": tail}, where.sum(1).tolist())


def cached_reference(batch: dict, config: Config, vocabulary: int) -> Callable | torch.Tensor:
    """The same as `teacher_reference`, from what the cache has put into the batch."""
    if config.stage == "pd":
        return batch["teacher_logprobs"].T.flatten()                 # (2B,): all chosen, then all rejected

    def kl_from_cache(logits: torch.Tensor, part: slice) -> torch.Tensor:
        return forward_kl_top_k(logits[:, :vocabulary], batch["teacher_ids"][part].long(),
                                batch["teacher_logprobs"][part], batch["teacher_tail"][part])
    return kl_from_cache


class Objective(nn.Module):
    """The student together with its loss, so that whatever spreads it over ranks sees one forward."""

    def __init__(self, student: Llava, config: Config):
        super().__init__()
        self.student = student
        self.config = config

    def forward(self, batch: dict, features: torch.Tensor, reference: Callable | torch.Tensor | None,
                total: dict[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One micro-batch's share of the global loss, and the sums behind every part of it.

        reference: what `teacher_reference` or `cached_reference` gives; None without a teacher.
        total: how many "response" and "distilled" tokens, "rows" and "pairs" the global batch has; the divisors.
        """
        config, student, input_ids = self.config, self.student, batch["input_ids"]
        hidden, where, routings = response_states(student, batch, features, config)
        targets = input_ids[:, 1:][where]                            # (N,)

        if config.stage == "pd":
            chosen, rejected = summed_logprobs(student, hidden, targets, where).chunk(2)             # (B,) each
            ref_chosen, ref_rejected = reference.chunk(2)
            each = PREFERENCES[config.preference_loss](chosen, rejected, ref_chosen, ref_rejected, config.beta)   # eq. 8
            loss = each.sum() / total["pairs"]
            margin = (chosen - ref_chosen) - (rejected - ref_rejected)
            sums = {"preference": each.sum(), "margin": margin.sum(), "accuracy": (margin > 0).sum(),
                    "chosen": chosen.sum(), "rejected": rejected.sum()}
        else:
            # When the prompt is distilled as well, the cross-entropy still belongs to the response only.
            is_response = batch["mask"][:, 1:][where]                # (N,)
            ce_weight = {"d2d": 0.0, "d2s": config.ce_weight}.get(config.stage, 1.0) / total["response"]

            def chunk_loss(logits: torch.Tensor, part: slice) -> tuple:
                """What n tokens add to the loss, and the terms that log.jsonl shows: (n, V) -> (n,), [(n,), ...]."""
                ce = cross_entropy(logits, targets[part]) * is_response[part]                        # eq. 5
                if reference is None:                                # align, sft, and d2s without a teacher's help
                    return ce_weight * ce, [ce]
                kl = reference(logits, part)                                                         # eq. 6
                return config.kd_weight * kl / total["distilled"] + ce_weight * ce, [ce, kl]         # eq. 7

            each, terms = chunked_loss(hidden, student.decoder.head_weight, chunk_loss)             # (N,), (1 or 2, N)
            loss = each.sum()
            sums = dict(zip(("ce", "kd"), terms.sum(1)))

        if routings:
            real = student.valid_positions(input_ids)
            balance = sum(balance_loss(routing, real).sum() for routing in routings)   # over layers and sequences
            loss = loss + config.balance_coef * balance / total["rows"]
            image = input_ids == student.config.image_token_id
            sums["balance"] = balance
            sums["counts"] = torch.stack([expert_counts(routing, real, image) for routing in routings])   # (layers, 2, E)
        return loss, {name: value.detach() for name, value in sums.items()}


DIVISOR = {"ce": "response", "kd": "distilled", "balance": "rows", "preference": "pairs", "margin": "pairs",
           "accuracy": "pairs", "chosen": "pairs", "rejected": "pairs"}


# -----------------------------------------------------------------------------
# Setting up

def check_settings(config: Config) -> None:
    """Whatever can be known to be wrong before anything is loaded."""
    choices = {"stage": list(TRAINABLE), "kd_tokens": ["response", "all"], "preference_loss": list(PREFERENCES),
               "dtype": ["bfloat16", "float32"], "device": ["", "cpu", "cuda"], "template": ["", *data.TEMPLATES],
               "parallel": ["ddp", "fsdp"]}
    for key, known in choices.items():
        if config[key] not in known:
            raise UserError(f"{key} is {config[key]!r}, expected one of {', '.join(k for k in known if k)}")
    for key in ("out_dir", "data"):
        if not config[key]:
            raise UserError(f"{key} is empty: say --{key}=… or set it in the config file")
    if bool(config.student) == bool(config.vision or config.llm) or bool(config.vision) != bool(config.llm):
        raise UserError("give either student=…, a checkpoint to start from, or both vision=… and llm=… for a new model")
    alone = config.stage == "d2s" and config.kd_weight == 0          # Table 6's baseline, made sparse without distillation
    if config.stage in WITH_TEACHER and not config.teacher and not alone:
        raise UserError(f"stage {config.stage} learns from a teacher: say --teacher=…, a LLaVA folder")
    if config.teacher_cache and not config.teacher:
        raise UserError("teacher_cache keeps the answers of a teacher: say --teacher=…, whose they are")
    if config.stage not in WITH_TEACHER and config.teacher:
        raise UserError(f"stage {config.stage} uses no teacher: leave teacher empty, or choose one of "
                          f"{', '.join(WITH_TEACHER)}")
    if config.template and config.student:
        raise UserError("template is the checkpoint's own; it can be chosen for a new model (vision and llm) only")
    positive = ("batch_size", "micro_batch_size", "max_length", "epochs", "learning_rate", "save_every", "log_every", "eps",
                "num_experts", "top_k", "teacher_top_k")
    for key in positive + ("warmup_ratio", "weight_decay", "grad_clip", "max_steps", "balance_coef", "num_workers", "seed"):
        if not config[key] >= 0 or (key in positive and config[key] == 0) or config[key] == math.inf:
            kind = "positive" if key in positive else "non-negative"
            raise UserError(f"{key} is {config[key]}, expected a {kind} number")
    for key in ("beta1", "beta2", "warmup_ratio"):
        if not 0 <= config[key] <= 1 or (key != "warmup_ratio" and config[key] == 1):
            raise UserError(f"{key} is {config[key]}, expected a number between 0 and 1")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; say --device=cpu")


def open_student(config: Config) -> Llava:
    if config.student:
        student = Llava.from_pretrained(config.student)
    else:
        student = Llava.from_parts(config.vision, config.llm, seed=config.seed, template=config.template or "vicuna")
    folder = config.student or config.llm
    if student.tokenizer is None:
        raise UserError(f"{folder}: has no tokenizer.json, which training needs")
    if student.config.template is None:
        raise UserError(f"{folder}: config.json does not say which template the model was trained with; add "
                              '"template": "vicuna" or "chatml"')
    if student.config.pad_token_id is None:
        raise UserError(f"{folder}: config.json names no pad_token_id, which batches of rows of unequal length need")
    sparse = bool(student.config.decoder.num_experts)
    if config.stage == "d2s" and not sparse:
        make_sparse(student, config)
    if config.stage == "pd" and not sparse:
        raise UserError(f"{folder}: is dense, and stage pd trains experts; run stage d2s first")
    return student


def make_sparse(student: Llava, config: Config) -> None:
    layers = config.moe_layers
    if layers[:1].isdigit() or layers[:1] == "-":
        try:
            layers = [int(number) for number in layers.split(",")]
        except ValueError:
            raise UserError(f"moe_layers is {layers!r}, expected layer numbers separated by commas") from None
    try:
        upcycle(student, config.num_experts, config.top_k, layers, config.norm_topk, config.seed)
    except ValueError as error:
        raise UserError(str(error)) from None


def open_rows(config: Config, student: Llava) -> data.RowData:
    Rows = data.PreferenceData if config.stage == "pd" else data.InstructionData
    return Rows(data.parse_sources(config.data), config.image_dir, student.tokenizer, student.config.template,
                student.config.image_tokens, student.config.vision.image_size, config.max_length)


def open_teacher(config: Config, student: Llava, dtype: torch.dtype, device: torch.device) -> Llava:
    """Frozen, in eval mode, without gradients or optimizer, in the dtype of the matrix products."""
    teacher = Llava.from_pretrained(config.teacher, dtype=dtype, device=device).requires_grad_(False).eval()
    check_teacher(student, teacher, config)
    if same_vision(student, teacher):
        teacher.vision = student.vision                              # one tower in memory, one pass per image
    return teacher


def open_cache(config: Config, student: Llava, dataset: data.RowData, collate: Callable, dtype: torch.dtype,
               ranks: distributed.Dist) -> TeacherCache:
    """What the teacher has said about these rows. Of what is missing, the teacher is asked now, and then let go."""
    made_with = {"data": dataset.fingerprint, "answers": "preferences" if config.stage == "pd" else "distributions",
                 "dtype": config.dtype, "teacher": None, "vocabulary": None}
    if config.stage != "pd":
        made_with |= {"kd_tokens": config.kd_tokens, "top_k": config.teacher_top_k}
    if Path(config.teacher).is_dir():
        theirs = read_json(Path(config.teacher) / "config.json")["text_config"]["vocab_size"]
        made_with |= {"teacher": digest_of_folder(config.teacher), "vocabulary": min(student.config.decoder.vocab_size, theirs)}
    cache = ranks.broadcast_from_rank0(lambda: TeacherCache(config.teacher_cache, len(dataset), made_with))
    missing = ranks.broadcast_from_rank0(cache.missing)
    if missing:
        with ranks.sync_errors():
            teacher = open_teacher(config, student, dtype, ranks.device)

            def ask(batch: dict) -> tuple[dict[str, torch.Tensor], list[int]]:
                return teacher_targets(teacher, to_device(ranks.device, batch), config, cache.made_with["vocabulary"])
            fill(missing, dataset, ask, collate, config.micro_batch_size, config.num_workers, ranks.rank, ranks.world_size)
    with ranks.sync_errors():
        if cache.missing():
            raise UserError(f"{config.teacher_cache}: {cache.missing()[0][0].name} is not to be seen from here; the folder must "
                            "be one that all machines share")
    return cache


def check_teacher(student: Llava, teacher: Llava, config: Config) -> None:
    """Same tokens, same template, same number of image positions: else the two answer different questions."""
    def vocabulary(llava: Llava) -> dict:
        return json.loads(llava.tokenizer.to_str())["model"] | {"added": llava.tokenizer.get_added_tokens_decoder().keys()}

    where = f"teacher {config.teacher} and student {config.student or config.llm}"
    if teacher.tokenizer is None or vocabulary(teacher) != vocabulary(student):
        raise UserError(f"{where}: their tokenizers differ; distillation compares token by token and needs one and the "
                              "same")
    for what in ("template", "image_token_id", "image_tokens"):
        if getattr(teacher.config, what) != getattr(student.config, what):
            raise UserError(f"{where}: {what} is {getattr(teacher.config, what)!r} and "
                                  f"{getattr(student.config, what)!r}; they must agree")
    if teacher.config.vision.image_size != student.config.vision.image_size:
        raise UserError(f"{where}: image sizes are {teacher.config.vision.image_size} and "
                              f"{student.config.vision.image_size} pixels; they must agree")


def same_vision(a: Llava, b: Llava) -> bool:
    """True when both towers compute the same features, so that one pass serves both."""
    if a.config.vision != b.config.vision:
        return False
    theirs = dict(b.vision.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.vision.named_parameters())


def choose_trainable(student: Llava, config: Config, dtype: torch.dtype) -> None:
    """Mark what learns (kept in fp32), freeze the rest (kept in `dtype`)."""
    patterns = TRAINABLE[config.stage] + (DENSE_FFN if config.train_dense_ffn and config.stage in ("d2s", "pd") else [])
    for name, parameter in student.named_parameters():
        parameter.requires_grad = not name.startswith("vision.") and any(pattern in name for pattern in patterns)
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then half a cosine down to 0. Steps count from 0."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


# -----------------------------------------------------------------------------
# The run

def dry_run(config: Config) -> None:
    """What the run would take on WORLD_SIZE GPUs, and what of its data is here. No weights, no GPU, no other ranks."""
    from tools import download, plan                                                      # which builds on this file
    if os.environ.get("RANK", "0") != "0":
        return
    lengths = steps = None
    folder = Path(config.student or config.llm)
    if (folder / "tokenizer.json").is_file() and all(Path(path).is_file() for path, _ in data.parse_sources(config.data)):
        if config.student:
            student = describe_llava(folder)
        else:
            student = describe_parts(Path(config.vision), folder, config.template or "vicuna")
        dataset = open_rows(config, student)
        for note in dataset.notes:
            print(note)
        lengths = dataset.lengths
        steps = config.max_steps or config.epochs * data.Sampler(lengths, config.batch_size, 0, dataset.sources).steps_per_epoch
    print(plan.report(config, int(os.environ.get("WORLD_SIZE", 1)), lengths, steps), end="\n\n")
    for line in download.check_manifest(config.stage, config.data):
        print(line)


def main(argv: list[str], stop: Stop | None = None) -> None:
    config = load_config(DEFAULTS, argv)
    check_settings(config)
    if config.dry_run:
        return dry_run(config)
    stop = stop or Stop()                                            # without a listener: nobody stops us
    ranks = distributed.init_distributed(config.device)
    say = print if ranks.rank == 0 else lambda *_, **__: None
    ranks.assert_same({key: value for key, value in config.items() if key not in MACHINE_LOCAL} | {"torch": torch.__version__})

    out_dir, first_step, state = Path(config.out_dir), 0, None
    finished, state_file, note = ranks.broadcast_from_rank0(lambda: resume.begin_or_resume(out_dir, config, MAY_CHANGE))
    if finished:
        say(f"{out_dir}: this run is finished already; nothing to do")
        return

    # Student, data and teacher. Whatever is wrong with them, on whichever rank, ends all ranks in one line.
    dtype = getattr(torch, config.dtype)
    with ranks.sync_errors():
        student = open_student(config)
        choose_trainable(student, config, dtype)
        student.to(ranks.device)
        student.decoder.checkpointing = config.checkpointing
    dataset = ranks.local_rank0_first(lambda: open_rows(config, student))
    collate = partial(data.collate_pairs if config.stage == "pd" else data.collate, pad_token_id=student.config.pad_token_id)
    ranks.assert_same(fingerprints(config, dataset))
    autocast = partial(torch.autocast, ranks.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    rows, teacher, cache = dataset, None, None
    if config.teacher_cache:
        with autocast():
            cache = open_cache(config, student, dataset, collate, dtype, ranks)
        rows, collate = RowsWithTeacher(dataset, cache), partial(collate_with_teacher, collate=collate)
    elif config.teacher:
        with ranks.sync_errors():
            teacher = open_teacher(config, student, dtype, ranks.device)
    if config.compile:
        for block in [*student.vision.blocks, *student.decoder.blocks, *(teacher.decoder.blocks if teacher else [])]:
            block.compile(dynamic=True)                              # rows come in all lengths
    with ranks.sync_errors():
        sampler = data.Sampler(dataset.lengths, config.batch_size, config.seed, dataset.sources)
        data.micro_batches(sampler.batch(0), config.micro_batch_size, ranks.rank, ranks.world_size)   # does it divide?
        if state_file:
            state = resume.read_state(state_file)
            sampler.load_state_dict(state["sampler"])
            first_step = state["step"]
    steps = config.max_steps or config.epochs * sampler.steps_per_epoch

    for line in [*dataset.notes, *filter(None, [note]), *introduction(config, student, teacher, dataset, ranks)]:
        say(line)
    say(f"{steps} steps" + (f", resuming after step {first_step}" if first_step else ""))

    # Spread over the ranks, and back to where the saved state stands
    objective, optimizer = distributed.parallelize(Objective(student, config), ranks, config.parallel, dtype, lr=config.learning_rate,
                                           betas=(config.beta1, config.beta2), eps=config.eps,
                                           weight_decay=config.weight_decay)
    learns = {name: p for name, p in student.named_parameters() if p.requires_grad}
    with ranks.sync_errors():
        if state:
            distributed.restore(learns, optimizer, state["weights"], state["adam"])
        if ranks.rank == 0:
            with resume.writing(out_dir / "run.json", 10_000):
                out_dir.mkdir(parents=True, exist_ok=True)
                resume.lock(out_dir)
                resume.go_back(out_dir, first_step)
                resume.write_run(out_dir, config, ranks.world_size, finished=False)
    del state

    def save_state(step: int) -> None:
        """What resuming needs."""
        weights, adam = distributed.gather(learns, ranks), distributed.gather_adam(learns, optimizer, ranks)
        with ranks.sync_errors():
            if ranks.rank == 0:
                resume.write_state(out_dir, {"step": step, "weights": weights, "adam": adam, "sampler": sampler.state_dict()})

    def export() -> None:
        """What others use: the student as a Hugging Face folder."""
        weights = distributed.gather(dict(student.named_parameters()), ranks)
        with ranks.sync_errors():
            if ranks.rank == 0:
                with resume.writing(out_dir / "model.safetensors", sum(w.numel() * dtype.itemsize for w in weights.values())):
                    student.save_pretrained(out_dir, dtype, weights)

    # The loop. A step is: learning rate, micro-batches, clip, update, log, save.
    stream = data.batches(rows, sampler, config.micro_batch_size, ranks.rank, ranks.world_size, first_step, steps,
                          config.num_workers, collate, pin_memory=ranks.device.type == "cuda")
    began, stop.can_wait = time.time(), True
    for step, micro in enumerate(stop.watch(stream), start=first_step + 1):
        step_began = time.time()
        lr = learning_rate(step - 1, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        total = count_batch(micro, student, config) | stop.votes()
        total = dict(zip(total, ranks.all_reduce(torch.tensor(list(total.values()), device=ranks.device)).tolist()))
        if any(total[vote] for vote in stop.votes()):                # some rank has to stop, so all do
            if step - 1 > first_step and (step - 1) % config.save_every:
                save_state(step - 1)
            stop.end(total, step - 1, ranks.rank)
        micro = [to_device(ranks.device, batch) for batch in micro]

        sums, loss_sum = {}, torch.zeros((), device=ranks.device)
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            with nullcontext() if last else distributed.no_sync(objective), autocast():
                features = image_features(student, batch, config.stage)
                reference = None
                if cache is not None:
                    reference = cached_reference(batch, config, cache.made_with["vocabulary"])
                elif teacher is not None:
                    same = teacher.vision is student.vision
                    seen = features if same else image_features(teacher, batch, config.stage)
                    reference = teacher_reference(teacher, batch, seen, config)
                loss, parts = objective(batch, features, reference, total)
                (loss * ranks.world_size).backward()                 # gradients are averaged over ranks; we want the sum
            loss_sum += loss.detach()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value

        loss_sum = ranks.all_reduce(loss_sum).item()
        sums = {name: ranks.all_reduce(value.double()) for name, value in sums.items()}
        grad_norm = distributed.full(nn.utils.get_total_norm([p.grad for p in learns.values()]))
        if not math.isfinite(loss_sum) or not grad_norm.isfinite():  # before the weights are touched
            with ranks.sync_errors():
                raise UserError(f"step {step}: loss {loss_sum}, gradient norm {grad_norm.item()}"
                                + what_is_not_finite(sums, learns, sampler.batch(step - 1), dataset, ranks))
        nn.utils.clip_grads_with_norm_(learns.values(), config.grad_clip or math.inf, grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.time() - step_began
        record = {"step": step, "loss": loss_sum}
        record |= {name: (value / total[DIVISOR[name]]).item() for name, value in sums.items() if name != "counts"}
        record |= {"lr": lr, "grad_norm": grad_norm.item(), "tokens": total["tokens"],
                   "tokens_per_s": round(total["tokens"] / seconds), "seconds": round(seconds, 4)}
        if "counts" in sums:
            load = sums["counts"] / sums["counts"].sum(-1, keepdim=True).clamp(min=1)          # (layers, 2, E)
            for i, what in enumerate(("image_load", "text_load")):
                record[what] = [[round(share, 4) for share in layer] for layer in load[:, i].tolist()]
        if ranks.rank == 0:
            resume.append_log(out_dir, record)
        if step % config.log_every == 0 or step == steps:
            left = (time.time() - began) / (step - first_step) * (steps - step)
            shown = {name: record[name] for name in DIVISOR if name in record}
            say(f"step {step}/{steps}  loss {record['loss']:.4f}  " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
                + f"  lr {lr:.2e}  grad {record['grad_norm']:.3f}  {record['tokens_per_s']:,} tok/s  {left / 60:.1f} min left",
                flush=True)
        if step % config.save_every == 0 or step == steps:
            save_state(step)
            export()

    if first_step == steps:                                          # ended after its last save: is the folder of that step?
        export()
    with ranks.sync_errors():
        if ranks.rank == 0:
            resume.write_run(out_dir, config, ranks.world_size, finished=True)
    say(f"{config.stage} done: {out_dir}")


def introduction(config: Config, student: Llava, teacher: Llava | None, dataset: data.RowData,
                 ranks: distributed.Dist) -> list[str]:
    """Who learns what from whom, in a few lines."""
    counts = student.count_parameters()
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    lines = [f"stage {config.stage}: {counts['vision'] + counts['adaptor'] + counts['decoder']:,} parameters "
             f"(decoder {counts['decoder']:,}, {counts['decoder_active']:,} active per token), {trained:,} of them learn",
             f"{len(dataset):,} rows, {config.batch_size} a step = {ranks.world_size} ranks x "
             f"{config.batch_size // (config.micro_batch_size * ranks.world_size)} micro-batches x {config.micro_batch_size}"]
    if config.teacher_cache:
        lines += [f"teacher: its answers are read from {config.teacher_cache}"]
    elif teacher is not None:
        lines += [f"teacher: {sum(p.numel() for p in teacher.decoder.parameters()):,} decoder parameters, frozen, "
                  f"{'sharing the ViT with the student' if teacher.vision is student.vision else 'with a ViT of its own'}"]
    return lines


def to_device(device: torch.device, batch: dict) -> dict:
    return {key: None if value is None else value.to(device, non_blocking=True) for key, value in batch.items()}


def count_batch(micro: list[dict], student: Llava, config: Config) -> dict[str, int]:
    """This rank's share of everything that a mean is taken over, and of all tokens."""
    total = {"response": 0, "distilled": 0, "rows": 0, "pairs": 0, "tokens": 0}
    for batch in micro:
        rows = len(batch["input_ids"])
        total["response"] += int(batch["mask"][:, 1:].sum())
        total["distilled"] += int(predicted(batch, student, config).sum())
        total["rows"] += rows
        total["pairs"] += rows // 2 if config.stage == "pd" else 0
        total["tokens"] += int(student.valid_positions(batch["input_ids"]).sum())
    return total


def fingerprints(config: Config, dataset: data.RowData) -> dict[str, str]:
    """What stands for the files that a rank has read: were they the same on every machine?"""
    found = {"data": dataset.fingerprint}
    for key in ("student", "teacher", "vision", "llm"):
        path = Path(config[key]) / "config.json"
        if config[key] and path.is_file():                           # with a teacher_cache, the teacher may be gone
            found[f"{key}'s config.json"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


def what_is_not_finite(sums: dict, learns: dict, rows: list[int], dataset: data.RowData, ranks: distributed.Dist) -> str:
    """The rest of a UserError's line: which part of the loss, whose gradient, which rows."""
    parts = {name: value for name, value in sums.items() if name in DIVISOR}
    fine = [name for name, value in parts.items() if value.isfinite()]
    broken = [not distributed.local(p.grad).isfinite().all() for p in learns.values()]
    broken = ranks.all_reduce(torch.tensor(broken, device=ranks.device).long()).tolist()
    names = [name for name, ranks_say in zip(learns, broken) if ranks_say]

    def some(items: list[str]) -> str:
        return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "") if items else "none"

    return (f"; finite parts of the loss: {some(fine)}, not finite: {some([name for name in parts if name not in fine])}; "
            f"gradients not finite: {some(names)}; the batch: {some([dataset.describe(row) for row in rows])}; the weights "
            "were not touched, and what was saved before is intact")


if __name__ == "__main__":
    stop = Stop()
    stop.listen()
    try:
        run(lambda argv: main(argv, stop), __doc__, DEFAULTS)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
