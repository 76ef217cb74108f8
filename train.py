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
and state/ (what resuming needs). The same command continues an interrupted run where its last save was, bit for bit.
"""
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from configurator import Config, ConfigError, load_config
from data import DataError
from losses import PREFERENCES, by_chunks, cross_entropy, forward_kl, forward_kl_top_k
from model import CheckpointError, Llava, write_file
from moe import balance_loss, expert_counts, upcycle
from teacher_cache import top_k

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
    # running
    seed=0,
    dtype="bfloat16",           # of the matrix products and the frozen weights; what learns is kept in fp32
    device="",                  # cpu | cuda; empty: cuda if there is one
    save_every=1000,
    log_every=10,               # steps between printed lines; log.jsonl has every step
    dry_run=False,              # set everything up, say what would happen, stop
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
MAY_CHANGE = ["out_dir", "device", "micro_batch_size", "num_workers", "save_every", "log_every", "dry_run"]


# -----------------------------------------------------------------------------
# The loss of one micro-batch. In sums: what divides them is counted over the whole global batch, beforehand.

def predicted(batch: dict, llava: Llava, config: Config) -> torch.Tensor:
    """(B, T-1) bool: true at t where the token at t+1 is one to learn from. The one place where labels are shifted."""
    if config.kd_tokens == "response" or not config.teacher or config.stage == "pd":
        return batch["mask"][:, 1:]
    is_text = llava.real_positions(batch["input_ids"]) & (batch["input_ids"] != llava.config.image_token_id)
    return is_text[:, 1:]                                            # of prompt and response


def summed_logprobs(llava: Llava, hidden: torch.Tensor, targets: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """log p(response | prompt) of each row: (N, D), (N,), (B, T-1) -> (B,)."""
    def logprob(logits: torch.Tensor, part: slice) -> tuple:
        each = -cross_entropy(logits, targets[part])
        return each, [each]

    rows = torch.where(where)[0]                                     # (N,) the row that each response token is in
    each, _ = by_chunks(hidden, llava.decoder.head_weight, logprob)  # (N,)
    return torch.zeros(len(where), device=hidden.device).index_add(0, rows, each)


def image_features(llava: Llava, batch: dict, stage: str) -> torch.Tensor:
    """(N, P, Dv). In pd the rejected rows show the chosen rows' images again: once through the ViT, then repeated."""
    features = llava.encode_images(batch["pixel_values"])
    return torch.cat([features, features]) if stage == "pd" else features


def states_to_learn(llava: Llava, batch: dict, features: torch.Tensor,
                    config: Config) -> tuple[torch.Tensor, torch.Tensor, list]:
    """The hidden states that predict a token to learn from (N, D), where they stand (B, T-1), and the routings.

    The output head, whose V columns are most of a small model's work, sees these positions only.
    """
    hidden, routings = llava.hidden_states(batch["input_ids"], features)
    where = predicted(batch, llava, config)
    return hidden[:, :-1][where], where, routings


@torch.no_grad()
def ask_teacher(teacher: Llava, batch: dict, features: torch.Tensor, config: Config) -> Callable | torch.Tensor:
    """What the objective compares the student with.

    In pd the teacher's log-probs of the answers, (2B,). Else a function of a few tokens' logits and which tokens they
    are, (n, V) and a slice of the N, that gives their KL from the teacher, (n,): like the student's, the teacher's logits
    are made only where and when they are needed.
    """
    hidden, where, _ = states_to_learn(teacher, batch, features, config)
    if config.stage == "pd":
        return summed_logprobs(teacher, hidden, batch["input_ids"][:, 1:][where], where)

    def kl_from_teacher(logits: torch.Tensor, part: slice) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher.decoder.head(hidden[part])      # (n, V')
        return forward_kl(logits, teacher_logits)
    return kl_from_teacher


@torch.no_grad()
def dictate(teacher: Llava, batch: dict, config: Config, vocabulary: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What teacher_cache.py keeps of a batch: tensors, their lines row after row, and how many lines each row has."""
    features = image_features(teacher, batch, config.stage)
    if config.stage == "pd":
        chosen_and_rejected = ask_teacher(teacher, batch, features, config).view(2, -1).T            # (B, 2)
        return {"teacher_logprobs": chosen_and_rejected}, [1] * len(chosen_and_rejected)
    hidden, where, _ = states_to_learn(teacher, batch, features, config)
    parts = [top_k(teacher.decoder.head(some)[:, :vocabulary], config.teacher_top_k) for some in hidden.split(256)]
    ids, logprobs, tail = (torch.cat(part) for part in zip(*parts))
    return ({"teacher_ids": ids.int(), "teacher_logprobs": logprobs, "teacher_tail": tail}, where.sum(1).tolist())


def recall_teacher(batch: dict, config: Config, vocabulary: int) -> Callable | torch.Tensor:
    """The same as `ask_teacher`, from what the cache has put into the batch."""
    if config.stage == "pd":
        return batch["teacher_logprobs"].T.flatten()                 # (2B,): all chosen, then all rejected

    def kl_from_cache(logits: torch.Tensor, part: slice) -> torch.Tensor:
        return forward_kl_top_k(logits[:, :vocabulary], batch["teacher_ids"][part].long(),
                                batch["teacher_logprobs"][part], batch["teacher_tail"][part])
    return kl_from_cache


class Objective(nn.Module):
    """The student together with its loss, so that DistributedDataParallel sees one forward."""

    def __init__(self, student: Llava, config: Config):
        super().__init__()
        self.student = student
        self.config = config

    def forward(self, batch: dict, features: torch.Tensor, reference: Callable | torch.Tensor | None,
                total: dict[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One micro-batch's share of the global loss, and the sums behind every part of it.

        reference: what `ask_teacher` or `recall_teacher` gives; None without a teacher.
        total: how many "response" and "distilled" tokens, "rows" and "pairs" the global batch has; the divisors.
        """
        config, student, input_ids = self.config, self.student, batch["input_ids"]
        hidden, where, routings = states_to_learn(student, batch, features, config)
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

            def of_some_tokens(logits: torch.Tensor, part: slice) -> tuple:
                """What n tokens add to the loss, and the terms that log.jsonl shows: (n, V) -> (n,), [(n,), ...]."""
                ce = cross_entropy(logits, targets[part]) * is_response[part]                        # eq. 5
                if reference is None:                                # align, sft, and d2s without a teacher's help
                    return ce_weight * ce, [ce]
                kl = reference(logits, part)                                                         # eq. 6
                return config.kd_weight * kl / total["distilled"] + ce_weight * ce, [ce, kl]         # eq. 7

            each, terms = by_chunks(hidden, student.decoder.head_weight, of_some_tokens)             # (N,), (1 or 2, N)
            loss = each.sum()
            sums = dict(zip(("ce", "kd"), terms.sum(1)))

        if routings:
            real = student.real_positions(input_ids)
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
               "dtype": ["bfloat16", "float32"], "device": ["", "cpu", "cuda"], "template": ["", *data.TEMPLATES]}
    for key, known in choices.items():
        if config[key] not in known:
            raise ConfigError(f"{key} is {config[key]!r}, expected one of {', '.join(k for k in known if k)}")
    for key in ("out_dir", "data"):
        if not config[key]:
            raise ConfigError(f"{key} is empty: say --{key}=… or set it in the config file")
    if bool(config.student) == bool(config.vision or config.llm) or bool(config.vision) != bool(config.llm):
        raise ConfigError("give either student=…, a checkpoint to start from, or both vision=… and llm=… for a new model")
    alone = config.stage == "d2s" and config.kd_weight == 0          # Table 6's baseline, made sparse without distillation
    if config.stage in WITH_TEACHER and not config.teacher and not alone:
        raise ConfigError(f"stage {config.stage} learns from a teacher: say --teacher=…, a LLaVA folder")
    if config.stage not in WITH_TEACHER and config.teacher:
        raise ConfigError(f"stage {config.stage} uses no teacher: leave teacher empty, or choose one of "
                          f"{', '.join(WITH_TEACHER)}")
    if config.template and config.student:
        raise ConfigError("template is the checkpoint's own; it can be chosen for a new model (vision and llm) only")
    positive = ("batch_size", "micro_batch_size", "max_length", "epochs", "learning_rate", "save_every", "log_every", "eps",
                "num_experts", "top_k")
    for key in positive + ("warmup_ratio", "weight_decay", "grad_clip", "max_steps", "balance_coef", "num_workers", "seed"):
        if not config[key] >= 0 or (key in positive and config[key] == 0) or config[key] == math.inf:
            kind = "positive" if key in positive else "non-negative"
            raise ConfigError(f"{key} is {config[key]}, expected a {kind} number")
    for key in ("beta1", "beta2", "warmup_ratio"):
        if not 0 <= config[key] <= 1 or (key != "warmup_ratio" and config[key] == 1):
            raise ConfigError(f"{key} is {config[key]}, expected a number between 0 and 1")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU here; say --device=cpu")


def open_student(config: Config) -> Llava:
    if config.student:
        student = Llava.from_pretrained(config.student)
    else:
        student = Llava.from_parts(config.vision, config.llm, seed=config.seed, template=config.template or "vicuna")
    folder = config.student or config.llm
    if student.tokenizer is None:
        raise CheckpointError(f"{folder}: has no tokenizer.json, which training needs")
    if student.config.template is None:
        raise CheckpointError(f"{folder}: config.json does not say which template the model was trained with; add "
                              '"template": "vicuna" or "chatml"')
    if student.config.pad_token_id is None:
        raise CheckpointError(f"{folder}: config.json names no pad_token_id, which batches of rows of unequal length need")
    sparse = bool(student.config.text.num_experts)
    if config.stage == "d2s" and not sparse:
        layers = config.moe_layers
        if layers[:1].isdigit() or layers[:1] == "-":
            try:
                layers = [int(number) for number in layers.split(",")]
            except ValueError:
                raise ConfigError(f"moe_layers is {layers!r}, expected layer numbers separated by commas") from None
        try:
            upcycle(student, config.num_experts, config.top_k, layers, config.norm_topk, config.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if config.stage == "pd" and not sparse:
        raise CheckpointError(f"{folder}: is dense, and stage pd trains experts; run stage d2s first")
    return student


def check_teacher(student: Llava, teacher: Llava, config: Config) -> None:
    """Same tokens, same template, same number of image positions: else the two answer different questions."""
    def vocabulary(llava: Llava) -> dict:
        return json.loads(llava.tokenizer.to_str())["model"] | {"added": llava.tokenizer.get_added_tokens_decoder().keys()}

    where = f"teacher {config.teacher} and student {config.student or config.llm}"
    if teacher.tokenizer is None or vocabulary(teacher) != vocabulary(student):
        raise CheckpointError(f"{where}: their tokenizers differ; distillation compares token by token and needs one and the "
                              "same")
    for what in ("template", "image_token_id", "image_tokens"):
        if getattr(teacher.config, what) != getattr(student.config, what):
            raise CheckpointError(f"{where}: {what} is {getattr(teacher.config, what)!r} and "
                                  f"{getattr(student.config, what)!r}; they must agree")
    if teacher.config.vision.image_size != student.config.vision.image_size:
        raise CheckpointError(f"{where}: image sizes are {teacher.config.vision.image_size} and "
                              f"{student.config.vision.image_size} pixels; they must agree")


def same_vision(a: Llava, b: Llava) -> bool:
    """True when both towers compute the same features, so that one pass serves both."""
    if a.config.vision != b.config.vision:
        return False
    theirs = dict(b.vision.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.vision.named_parameters())


def choose_trainable(student: Llava, config: Config, dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """Mark what learns (kept in fp32), freeze the rest (kept in `dtype`)."""
    patterns = TRAINABLE[config.stage] + (DENSE_FFN if config.train_dense_ffn and config.stage in ("d2s", "pd") else [])
    learns = []
    for name, parameter in student.named_parameters():
        parameter.requires_grad = not name.startswith("vision.") and any(pattern in name for pattern in patterns)
        if parameter.requires_grad:
            learns.append((name, parameter))
        else:
            parameter.data = parameter.data.to(dtype)
    return learns


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then half a cosine down to 0. Steps count from 0."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


# -----------------------------------------------------------------------------
# Saving and resuming

def begin_or_resume(out_dir: Path, config: Config) -> dict | None:
    """The saved state of an interrupted run of the same settings, or None for a new one."""
    settings = {key: value for key, value in config.items() if key not in MAY_CHANGE}
    if not (out_dir / "run.json").is_file():
        return None
    before = json.loads((out_dir / "run.json").read_text())
    for key, value in settings.items():
        if before["config"].get(key) != value:
            raise ConfigError(f"{out_dir} holds a run with {key}={before['config'].get(key)!r}, this one has "
                              f"{key}={value!r}; choose another out_dir, or repeat the command that began it")
    if before.get("finished"):
        return {"finished": True}
    state = out_dir / "state" / "state.pt"
    return torch.load(state, map_location="cpu", weights_only=True) if state.is_file() else None


def write_run(out_dir: Path, config: Config, world_size: int, finished: bool) -> None:
    packages = ["torch", "tokenizers", "safetensors", "pillow", "numpy", "einops"]
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in packages}
    record = {"config": dict(config), "world_size": world_size, "versions": versions, "finished": finished}
    write_file(out_dir / "run.json", json.dumps(record, indent=2))


def save_state(out_dir: Path, state: dict) -> None:
    """Only what learns, in fp32: the frozen rest is read again from where it came from."""
    folder = out_dir / "state"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "state.pt.tmp")
    os.replace(folder / "state.pt.tmp", folder / "state.pt")


def cut_log(path: Path, step: int) -> None:
    """Drop the records of steps after the last save: they are about to be run again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]   # the last may be torn
        write_file(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))


# -----------------------------------------------------------------------------
# The run

def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    check_settings(config)

    # Ranks and device. Under torchrun there are several processes, each with its own share of every batch.
    distributed = "RANK" in os.environ
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    use_cuda = config.device == "cuda" or (not config.device and torch.cuda.is_available())
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if use_cuda else "cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                   # tf32 for what autocast leaves in fp32
    if distributed:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    say = print if rank == 0 else lambda *_, **__: None

    out_dir = Path(config.out_dir)
    state = begin_or_resume(out_dir, config)
    if state and state.get("finished"):
        say(f"{out_dir}: this run is finished already; nothing to do")
        return

    # Student and teacher
    dtype = getattr(torch, config.dtype)
    student = open_student(config)
    learns = choose_trainable(student, config, dtype)
    student.to(device)
    teacher = None
    if config.teacher:
        # Frozen, in eval mode, without gradients or optimizer, in the dtype of the matrix products.
        teacher = Llava.from_pretrained(config.teacher, dtype=dtype, device=device).requires_grad_(False).eval()
        check_teacher(student, teacher, config)
        if same_vision(student, teacher):
            teacher.vision = student.vision                          # one tower in memory, one pass per image

    # Data
    Rows, collate = data.InstructionData, data.collate
    if config.stage == "pd":
        Rows, collate = data.PreferenceData, data.collate_pairs
    dataset = Rows(data.parse_sources(config.data), config.image_dir, student.tokenizer, student.config.template,
                   student.config.image_tokens, student.config.vision.image_size, config.max_length)
    sampler = data.Sampler(dataset.lengths, config.batch_size, config.seed, dataset.sources)
    data.micro_batches(sampler.batch(0), config.micro_batch_size, rank, world_size)   # complains now if it does not divide
    steps = config.max_steps or config.epochs * sampler.steps_per_epoch

    # Optimizer
    optimizer = torch.optim.AdamW([p for _, p in learns], lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                  eps=config.eps, weight_decay=config.weight_decay, fused=True)
    first_step = 0
    if state:
        sampler.load_state_dict(state["sampler"])
        for name, parameter in learns:
            parameter.data.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    del state

    counts = student.count_parameters()
    trained = sum(p.numel() for _, p in learns)
    for note in dataset.notes:
        say(note)
    say(f"stage {config.stage}: {counts['vision'] + counts['adaptor'] + counts['decoder']:,} parameters "
        f"(decoder {counts['decoder']:,}, {counts['decoder_active']:,} active per token), {trained:,} of them learn")
    say(f"{len(dataset):,} rows, {config.batch_size} a step = {world_size} ranks x "
        f"{config.batch_size // (config.micro_batch_size * world_size)} micro-batches x {config.micro_batch_size}; "
        f"{steps} steps" + (f", resuming after step {first_step}" if first_step else ""))
    if teacher is not None:
        say(f"teacher: {sum(p.numel() for p in teacher.decoder.parameters()):,} decoder parameters, frozen, "
            f"{'sharing the ViT with the student' if teacher.vision is student.vision else 'with a ViT of its own'}")
    if config.dry_run:
        say("dry run: nothing was trained or written")
        return

    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_run(out_dir, config, world_size, finished=False)
        cut_log(out_dir / "log.jsonl", first_step)
    objective = Objective(student, config)
    if distributed:
        objective = DistributedDataParallel(objective, device_ids=[device] if use_cuda else None,
                                            gradient_as_bucket_view=True)
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def save(step: int) -> None:
        if rank == 0:
            weights = {name: p.detach().cpu() for name, p in learns}
            save_state(out_dir, {"step": step, "weights": weights, "optimizer": optimizer.state_dict(),
                                 "sampler": sampler.state_dict()})
            student.save_pretrained(out_dir, dtype=dtype)

    def add_up(values: torch.Tensor) -> torch.Tensor:
        if distributed:
            dist.all_reduce(values)
        return values

    # The loop. A step is: learning rate, micro-batches, clip, update, log, save.
    pad = student.config.pad_token_id
    stream = data.batches(dataset, sampler, config.micro_batch_size, rank, world_size, first_step, steps,
                          config.num_workers, partial(collate, pad_token_id=pad))
    began = time.time()
    for step, micro in enumerate(stream, start=first_step + 1):
        step_began = time.time()
        lr = learning_rate(step - 1, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        total = count_batch(micro, student, config)
        total = dict(zip(total, add_up(torch.tensor(list(total.values()), device=device)).tolist()))
        micro = [{key: None if value is None else value.to(device) for key, value in batch.items()} for batch in micro]

        sums, loss_sum = {}, torch.zeros((), device=device)
        for i, batch in enumerate(micro):
            # DDP averages gradients over ranks after the last backward; before it, each rank just adds up its own.
            last = i == len(micro) - 1
            with objective.no_sync() if distributed and not last else nullcontext(), autocast():
                features, reference = image_features(student, batch, config.stage), None
                if teacher is not None and teacher.vision is student.vision:
                    reference = ask_teacher(teacher, batch, features, config)
                elif teacher is not None:
                    reference = ask_teacher(teacher, batch, image_features(teacher, batch, config.stage), config)
                loss, parts = objective(batch, features, reference, total)
                (loss * world_size).backward()                       # DDP divides by the ranks; what is left is the sum
            loss_sum += loss.detach()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value

        loss_sum = add_up(loss_sum).item()
        grad_norm = nn.utils.clip_grad_norm_([p for _, p in learns], config.grad_clip or math.inf).item()
        if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step}: loss {loss_sum}, gradient norm {grad_norm}; the weights are still "
                                     f"those of step {step - 1}, rows {sampler.batch(step - 1)} were in the batch")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        sums = {name: add_up(value.double()) for name, value in sums.items()}
        seconds = time.time() - step_began
        record = {"step": step, "loss": loss_sum}
        record |= {name: (value / total[DIVISOR[name]]).item() for name, value in sums.items() if name != "counts"}
        record |= {"lr": lr, "grad_norm": grad_norm, "tokens": total["tokens"],
                   "tokens_per_s": round(total["tokens"] / seconds), "seconds": round(seconds, 4)}
        if "counts" in sums:
            load = sums["counts"] / sums["counts"].sum(-1, keepdim=True).clamp(min=1)          # (layers, 2, E)
            for i, what in enumerate(("image_load", "text_load")):
                record[what] = [[round(share, 4) for share in layer] for layer in load[:, i].tolist()]
        if rank == 0:
            with open(out_dir / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
        if step % config.log_every == 0 or step == steps:
            left = (time.time() - began) / (step - first_step) * (steps - step)
            shown = {name: record[name] for name in DIVISOR if name in record}
            say(f"step {step}/{steps}  loss {record['loss']:.4f}  " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
                + f"  lr {lr:.2e}  grad {grad_norm:.3f}  {record['tokens_per_s']:,} tok/s  {left / 60:.1f} min left",
                flush=True)
        if step % config.save_every == 0 or step == steps:
            save(step)

    if rank == 0:
        write_run(out_dir, config, world_size, finished=True)
    say(f"{config.stage} done: {out_dir}")


def count_batch(micro: list[dict], student: Llava, config: Config) -> dict[str, int]:
    """This rank's share of everything that a mean is taken over, and of all tokens."""
    total = {"response": 0, "distilled": 0, "rows": 0, "pairs": 0, "tokens": 0}
    for batch in micro:
        rows = len(batch["input_ids"])
        total["response"] += int(batch["mask"][:, 1:].sum())
        total["distilled"] += int(predicted(batch, student, config).sum())
        total["rows"] += rows
        total["pairs"] += rows // 2 if config.stage == "pd" else 0
        total["tokens"] += int(student.real_positions(batch["input_ids"]).sum())
    return total


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
