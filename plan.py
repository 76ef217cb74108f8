"""
What a run will take, worked out before it starts: memory per GPU, arithmetic per step, hours. No weights, no GPU.

    python train.py config/d2s.py --dry_run=True --student=Qwen/Qwen1.5-1.8B --teacher=Qwen/Qwen1.5-7B
    python plan.py                        the README's table: every stage of the paper's four students, in Markdown

Memory has two halves. What stands there all the time grows with the model:

    a parameter that learns    4 bytes of weight + 4 of gradient + 8 of Adam's two averages, all fp32   = 16
    a frozen parameter         2 bytes, bf16, and nothing else: a frozen 7B teacher takes less than a 1B student that learns

(parallel.py says how ranks share the 16.) What comes and goes with a pass grows with its tokens: each operation keeps
whatever its own derivative will ask for. A product with a matrix keeps its input if the matrix learns, SiLU and "times"
keep theirs in any case, attention keeps q, k, v, its output and one number per row (never the T x T scores), a norm keeps
its input in fp32. Checkpointing keeps only what goes into each block, and computes the block again when the backward gets
there: time for memory.

Arithmetic is nearly all products with matrices. A vector times a matrix of n numbers is n multiplications and n additions:

    2n FLOPs forward; 2n backward for the gradient of the vector; 2n backward for the gradient of the matrix

The last only if the matrix learns, the middle one only if something before it does. In every stage the adaptor learns and
stands before the decoder, so freezing the decoder saves a third of the arithmetic, not two. Attention adds T x T dot
products per head, half of which causality spares. Norms, rotations and softmax are few FLOPs, yet take time; they are part
of why a GPU reaches UTILISATION and not 1.

The models are built on torch's meta device: shapes and dtypes without numbers. What can be counted off them is counted, and
the tests hold the rest against what a step really does. Letters as in model.py; GB are 10^9 bytes.
"""
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import Config, load_config
from model import (DECODERS, FFN, Block, CheckpointError, DecoderConfig, Llava, LlavaConfig, VisionConfig,
                   read_decoder_config, read_json, read_vision_config)
from moe import SparseFFN, upcycle
from train import DEFAULTS, choose_trainable

# Assumptions. A report prints them.
PEAK_FLOPS = {"bfloat16": 312e12, "float32": 156e12}   # of an A100, a second; fp32 by way of tf32
UTILISATION = 0.4              # the share of it that a training step reaches
OVERHEAD = 1.5e9               # bytes: CUDA context, buffers of NCCL and cuBLAS
CARDS = {"40 GB": 40e9, "80 GB": 80e9}   # they hold 7% more; we leave that to the fragments between tensors
CHUNK = 256                    # tokens whose logits exist at one time: losses.by_chunks on a GPU
TOWER = "openai/clip-vit-large-patch14-336"
PAPER_HOURS = 960              # A100-hours, the paper's; it says neither for which student nor whether a teacher is included


class Stage(NamedTuple):
    """The paper's data of a stage: how many rows, and our guess of what an average one holds beside its image."""
    rows: int                  # in pd: pairs
    text: int                  # tokens, system prompt and question included; in pd with one of the two answers
    response: int              # those of them that are learned from


STAGES = {
    "align": Stage(558_128, 75, 25),       # one short caption each
    "sft": Stage(665_298, 300, 150),       # LLaVA-1.5's mixture, which the teacher is tuned with
    "d2d": Stage(2_400_000, 250, 180),     # long captions, some dialogues
    "d2s": Stage(1_400_000, 250, 130),     # short answers, several to an image
    "pd": Stage(83_132, 160, 100),         # RLAIF-V
}


class Batch(NamedTuple):
    """The rows of a pass or of a step, as far as their cost goes."""
    rows: int                  # sequences in the decoder; in pd two for each pair
    tokens: float              # T
    learned: float             # tokens that the head is applied to, of all rows together
    images: int                # through the ViT; in pd both rows of a pair show the same

    @classmethod
    def of(cls, config: Config, items: int, tokens: float, response: float) -> "Batch":
        """`items` rows, in pd pairs, with one image each."""
        rows = 2 * items if config.stage == "pd" else items
        return cls(rows, tokens, rows * response, items)


# -----------------------------------------------------------------------------
# The models, without weights

def build(config: Config) -> tuple[Llava, Llava | None]:
    """Student and teacher of a run on the meta device: in their dtypes, and what learns marked."""
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        student = Llava(describe(config.student) if config.student else describe_parts(config.vision, config.llm))
        teacher = Llava(describe(config.teacher)).to(dtype).requires_grad_(False) if config.teacher else None
        if config.stage in ("d2s", "pd") and not student.config.text.num_experts:
            upcycle(student, config.num_experts, config.top_k, config.moe_layers, config.norm_topk)
    choose_trainable(student, config, dtype)
    if teacher is not None and teacher.config.vision == student.config.vision:
        teacher.vision = student.vision                              # as in train.py, where the weights must agree as well
    return student, teacher


def describe(name: str) -> LlavaConfig:
    """A LLaVA folder, of which config.json is enough, or a published decoder's name, with CLIP-L/14-336 before it."""
    if name in DECODERS:
        return describe_parts(TOWER, name)
    path = Path(name) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{name}: neither a checkpoint folder (there is no {path}) nor, for a dry run, one of "
                              f"{', '.join(DECODERS)}")
    config = read_json(path)
    vision = read_vision_config(path, config["vision_config"])
    vision.feature_layer = config.get("vision_feature_layer", -2)
    return LlavaConfig(vision, read_decoder_config(path, config["text_config"]), 0, 0, None, None)


def describe_parts(vision: str, llm: str) -> LlavaConfig:
    """A CLIP folder or TOWER, and a Qwen folder or a name of DECODERS."""
    return LlavaConfig(VisionConfig(), replace(DECODERS[llm]), 0, 0, None, None)


# -----------------------------------------------------------------------------
# Memory, in bytes per GPU

class Width(NamedTuple):
    """Bytes per number."""
    product: int               # what goes into and comes out of products with matrices
    stream: int                # the residual stream. It has the dtype of the embedding, fp32 where that learns


def memory(student: Llava, teacher: Llava | None, config: Config, world_size: int, batch: Batch) -> dict[str, float]:
    """Item by item what the fullest GPU holds at the worst moment of its work on the micro-batch `batch`."""
    fsdp = config.parallel == "fsdp" and world_size > 1
    half = getattr(torch, config.dtype).itemsize
    width = Width(half, half if fsdp else student.decoder.embedding.weight.element_size())
    learns = [p for p in student.parameters() if p.requires_grad]
    seen = [p for p in student.parameters() if not p.requires_grad]
    whole = size_of(student.vision.parameters())                     # fsdp leaves the ViT and the teacher alone
    items = {
        "weights that learn, fp32": size_of(learns) / (world_size if fsdp else 1),
        "frozen weights": whole + (size_of(seen) - whole) / (world_size if fsdp else 1),
        "teacher": 0,
        "gradients, fp32": 4 * count(learns) / (world_size if fsdp else 1),
        "Adam's averages, fp32": 8 * (count(learns) / world_size if fsdp else largest_share(learns, world_size)),
        "bf16 copies of weights": gathered(student, half) if fsdp else copied(student, half),
        "activations": activations(student, batch, config.checkpointing, width),
    }
    if teacher is not None and not config.teacher_cache:
        items["teacher"] = size_of(teacher.parameters()) - (whole if teacher.vision is student.vision else 0)
    # These follow one another, so only the worst of them counts. At the first and the last no activations are there.
    moments = {
        "ViT and teacher": frozen_pass(student, teacher, batch, width) - items["activations"],
        "loss": loss_work(student, teacher, config, batch, width),
        "backward of a block": block_work(student, batch, config.checkpointing, width) + (shard_work(student, half) if fsdp else 0),
        "backward of the embedding": embedding_work(student, fsdp, half) - items["activations"],
    }
    worst = max(moments, key=moments.get)
    items[f"working memory, worst in: {worst}"] = moments[worst]
    items["CUDA, NCCL, cuBLAS"] = OVERHEAD
    return items


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def size_of(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def largest_share(parameters: list, world_size: int) -> int:
    """How many numbers the fullest rank updates. ZeroRedundancyOptimizer deals out whole parameters, largest first, each
    to the emptiest rank, and one embedding can be more than a fair share."""
    ranks = [0] * world_size
    for size in sorted((p.numel() for p in parameters), reverse=True):
        ranks[ranks.index(min(ranks))] += size
    return max(ranks)


def copied(student: Llava, half: int) -> float:
    """autocast casts each fp32 matrix at its first use and keeps the copy until the pass is over."""
    # not the embedding (looked up, not multiplied), the norms and routers (fp32), the head (the loss casts it, see there)
    uncast = ("norm.", ".router.", "embedding.", "lm_head.")
    return half * count(p for name, p in student.named_parameters()
                        if p.element_size() > half and not any(part in name for part in uncast))


def activations(student: Llava, batch: Batch, checkpointing: bool, width: Width) -> float:
    """What the forward keeps for the backward."""
    D, Dv = student.config.text.n_embd, student.config.vision.n_embd
    per_patch = width.product * (Dv + 2 * D)                         # the adaptor's input, before and after GELU
    per_token = 4 * D                                                # the last norm's input
    for block in student.decoder.blocks:
        per_token += width.stream * D if checkpointing else kept_by_block(block, width)
    return batch.rows * (student.config.image_tokens * per_patch + batch.tokens * per_token)


def kept_by_block(block: Block, width: Width) -> float:
    """Bytes per token."""
    attn, ffn, half = block.attn, block.ffn, width.product
    D, q, kv = attn.q_proj.in_features, attn.q_proj.out_features, attn.k_proj.out_features

    def input_of(*linears) -> int:
        """Kept if the matrix learns. Several products share one input, unless each has cast it for itself."""
        learn = sum(linear.weight.requires_grad for linear in linears)
        return half * D * (learn if width.stream != half else min(learn, 1))

    kept = 4 * D + input_of(attn.q_proj, attn.k_proj, attn.v_proj)   # the first norm's input, and its output
    kept += half * (q + kv + kv + q) + 4 * attn.n_head               # q, k, v, what o_proj gets; log-sum-exp of each row
    kept += 4 * D                                                    # the second norm's input
    if not isinstance(ffn, SparseFFN):
        return kept + input_of(ffn.gate_proj, ffn.up_proj) + ffn_wide(ffn, half)
    expert, A = ffn.experts[0], ffn.top_k
    kept += 4 * D                                                    # the router's input, fp32
    return kept + A * (input_of(expert.gate_proj) + ffn_wide(expert, half) + half * D)   # ... and the experts' output


def ffn_wide(ffn: FFN, half: int) -> int:
    """gate, silu(gate), up, and their product if down_proj learns."""
    return half * ffn.gate_proj.out_features * (4 if ffn.down_proj.weight.requires_grad else 3)


def frozen_pass(student: Llava, teacher: Llava | None, batch: Batch, width: Width) -> float:
    """Without gradients nothing is kept: the insides of one block at a time, of the ViT or of the teacher."""
    vision, half = student.config.vision, width.product
    work = half * batch.images * (vision.patches + 1) * (3 * vision.ffn + 4 * vision.n_embd)
    if teacher is not None:
        text = teacher.config.text
        work = max(work, batch.rows * batch.tokens * (half * (3 * text.ffn + 3 * text.n_embd) + 4 * text.n_embd))
    return work


def loss_work(student: Llava, teacher: Llava | None, config: Config, batch: Batch, width: Width) -> float:
    """Both models' logits and what is made of them, CHUNK tokens at a time."""
    head, half = student.decoder.head_weight, width.product
    V, D = head.shape
    work = half * batch.learned * 2 * D                              # what the head reads, and its gradient
    if head.requires_grad:
        work += 4 * V * D + half * V * D                             # its own gradient so far, and its copy in bf16
    per_logit = 16                                                   # in bf16 and fp32, log-softmax, gradient
    if teacher is not None and config.stage != "pd":
        work += half * batch.learned * teacher.config.text.n_embd
        per_logit = 32                                               # once more for the KL, the teacher's, their product
    return work + min(CHUNK, batch.learned) * V * per_logit


def block_work(student: Llava, batch: Batch, checkpointing: bool, width: Width) -> float:
    """While the backward is inside a block: gradients on their way, and what was computed again."""
    half, D, worst = width.product, student.config.text.n_embd, 0
    for block in student.decoder.blocks:
        if isinstance(block.ffn, SparseFFN):                         # the experts' outputs, weighted, added up; their input
            per_token = (half + 4) * block.ffn.top_k * D + (4 + 3 * half) * D
        else:                                                        # six FFN-wide tensors, of which some were kept anyway
            per_token = 6 * half * block.ffn.gate_proj.out_features - ffn_wide(block.ffn, half)
        per_token += width.stream * D - 4 * D                        # the stream's gradient; the last norm's input is gone
        if checkpointing:                                            # an fp32 stream was kept already, as the block's input
            per_token += kept_by_block(block, width) - (4 * D if width.stream == 4 else 0)
        worst = max(worst, per_token)
    return batch.rows * batch.tokens * worst


def embedding_work(student: Llava, fsdp: bool, half: int) -> float:
    """The last of the backward: the embedding's gradient is as large as the embedding, however few rows were looked up."""
    embedding, text = student.decoder.embedding.weight, student.config.text
    if not embedding.requires_grad:
        return 0
    if fsdp:                                                         # of head and embedding, in bf16, then in fp32 to add up
        return (half + 4) * count([embedding, *([] if text.tied else [student.decoder.head_weight])])
    return 4 * embedding.numel() * (2 if text.tied else 1)           # if tied, the head's has waited for it


# With fsdp a rank puts layers together when their turn comes.

def gathered(student: Llava, half: int) -> float:
    """Embedding, head and adaptor stay together through the pass; of the layers, this one and the next are."""
    root = count(p for name, p in student.named_parameters() if name.startswith("adaptor.") or
                 name.startswith("decoder.") and ".blocks." not in name)
    return half * (root + 2 * largest_unit(student))


def largest_unit(student: Llava) -> int:
    """What is sharded together is put together: a dense block; an expert, and what else is in its block."""
    experts = [expert for block in student.decoder.blocks if isinstance(block.ffn, SparseFFN) for expert in block.ffn.experts]
    blocks = [[p for name, p in block.named_parameters() if ".experts." not in name] for block in student.decoder.blocks]
    return max(count(parameters) for parameters in [*blocks, *(expert.parameters() for expert in experts)])


def shard_work(student: Llava, half: int) -> float:
    """Gradients on their way to the ranks that own them: the layer above's in fp32, the head's in bf16 until the end."""
    head = student.decoder.head_weight
    return 4 * largest_unit(student) + half * (head.numel() if head.requires_grad else 0)


# -----------------------------------------------------------------------------
# Arithmetic, in FLOPs for all of `batch`

def flops(student: Llava, teacher: Llava | None, config: Config, batch: Batch) -> dict[str, Counter]:
    """Of each pass, what its products with matrices take ("matrices", "head") and its attention's T x T products."""
    passes = {what: Counter() for what in ("ViT", "teacher forward", "student forward", "student backward",
                                           "student's blocks again")}
    for llava, forward in ((student, "student forward"), (teacher, "teacher forward")):
        if llava is None:
            continue
        looks = llava is student or teacher.vision is not student.vision       # or has another looked for it?
        for _, part, p, vectors in products(llava, batch):
            if part != "ViT":
                passes[forward][part] += 2 * p.numel() * vectors
            elif looks:
                passes["ViT"]["matrices"] += 2 * p.numel() * vectors
        vision, text = llava.config.vision, llava.config.text
        if looks:
            passes["ViT"]["attention"] += batch.images * blocks_run(vision) * quadratic(vision.patches + 1, vision.n_embd)
        passes[forward]["attention"] = batch.rows * text.n_layer * quadratic(batch.tokens, text.n_embd) / 2   # causal

    upstream = False                                                 # does anything learn that comes before this matrix?
    for name, part, p, vectors in products(student, batch):
        passes["student backward"][part] += 2 * p.numel() * vectors * (upstream + p.requires_grad)
        upstream = upstream or p.requires_grad
        ends_block = name.endswith(".ffn.down_proj.weight")          # nothing after it was kept, so it need not run again
        if config.checkpointing and ".blocks." in name and part == "matrices" and not ends_block:
            passes["student's blocks again"]["matrices"] += 2 * p.numel() * vectors
    forward = passes["student forward"]["attention"]
    passes["student backward"]["attention"] = 2.5 * forward          # the scores again; gradients of v, weights, q and k
    passes["student's blocks again"]["attention"] = forward * config.checkpointing
    return passes


def products(llava: Llava, batch: Batch) -> Iterator[tuple[str, str, torch.Tensor, float]]:
    """(name, part, matrix, how many vectors of the batch it multiplies), in the order of the forward."""
    vision, text, tokens = llava.config.vision, llava.config.text, batch.rows * batch.tokens
    for name, p in llava.named_parameters():
        if p is llava.decoder.head_weight:
            yield name, "head", p, batch.learned
        elif p.ndim == 1 or "embedding.weight" in name and "patch" not in name:
            continue                                                 # added, or looked up
        elif name.startswith("vision.patch_embedding."):
            yield name, "ViT", p, batch.images * vision.patches
        elif name.startswith("vision."):
            yield name, "ViT", p, batch.images * (vision.patches + 1) * (int(name.split(".")[2]) < blocks_run(vision))
        elif name.startswith("adaptor."):
            yield name, "matrices", p, batch.rows * vision.patches
        else:
            yield name, "matrices", p, tokens * (text.top_k / text.num_experts if ".experts." in name else 1)


def blocks_run(vision: VisionConfig) -> int:
    return vision.n_layer + 1 + vision.feature_layer


def quadratic(T: float, D: int) -> float:
    """One row in one layer: each of T positions with each, q . k and weight x v, over all heads."""
    return 2 * 2 * T * T * D


# -----------------------------------------------------------------------------
# What it comes to

def worst_batch(config: Config, micro_batch_size: int) -> Batch:
    """One pass of the longest rows."""
    return Batch.of(config, micro_batch_size, config.max_length, config.max_length)


def mean_batch(student: Llava, config: Config, tokens: float | None) -> Batch:
    """A step of average rows."""
    stage = STAGES[config.stage]
    tokens = tokens or student.config.image_tokens + stage.text
    learned = stage.text if config.kd_tokens == "all" and config.teacher and config.stage != "pd" else stage.response
    return Batch.of(config, config.batch_size, tokens, learned)


def paper_steps(config: Config) -> int:
    return config.max_steps or config.epochs * STAGES[config.stage].rows // config.batch_size


def gpu_hours(passes: dict[str, Counter], steps: int, config: Config) -> float:
    return steps * sum(parts.total() for parts in passes.values()) / (UTILISATION * PEAK_FLOPS[config.dtype]) / 3600


def largest_fit(student: Llava, teacher: Llava | None, config: Config, world_size: int, limit: float) -> int:
    """The largest micro_batch_size that a card of `limit` bytes has room for; 0: none."""
    share = max(1, config.batch_size // world_size)
    sizes = [m for m in range(1, share + 1) if share % m == 0]
    return max([m for m in sizes if sum(memory(student, teacher, config, world_size, worst_batch(config, m)).values()) <= limit],
               default=0)


def verdict(student: Llava, teacher: Llava | None, config: Config, world_size: int, limit: float) -> str:
    """Does it fit, and if not, what would."""
    now = largest_fit(student, teacher, config, world_size, limit)
    if now >= config.micro_batch_size:
        return f"fits, up to micro_batch_size={now}"
    if now:
        return f"does not fit; micro_batch_size={now} does"
    for change in ({"checkpointing": True}, {"parallel": "fsdp"}, {"checkpointing": True, "parallel": "fsdp"}):
        fit = largest_fit(student, teacher, Config(config, **change), world_size, limit)
        if fit:
            return f"does not fit; {' '.join(f'--{key}={value}' for key, value in change.items())} does, up to micro_batch_size={fit}"
    return "does not fit, and neither checkpointing nor fsdp changes that"


def report(config: Config, world_size: int, tokens: float | None = None, steps: int | None = None) -> str:
    """What `train.py --dry_run` prints. `tokens` (the mean length of a row) and `steps` where the data are at hand."""
    student, teacher = build(config)
    text, stage, gpus = student.config.text, STAGES[config.stage], f"{world_size} GPU" + "s" * (world_size > 1)
    lines = [f"stage {config.stage} on {gpus}, {config.batch_size} rows a step, {config.micro_batch_size} a GPU and pass",
             f"student {config.student or config.llm}" + (f", {text.num_experts} experts, {text.top_k} active, in "
             f"{len(text.sparse_layers)} of {text.n_layer} layers" if text.num_experts else "")
             + (f"; teacher {config.teacher}" if teacher else ""), ""]
    lines += columns([["parameters", "all", "active per token", "learn"], *parameter_rows(student, teacher)])

    items = memory(student, teacher, config, world_size, worst_batch(config, config.micro_batch_size))
    sizes = [[item, f"{size / 1e9:.2f}"] for item, size in items.items()]
    lines += ["", *columns([["memory per GPU", "GB"], *sizes, ["sum", f"{sum(items.values()) / 1e9:.2f}"]])]
    lines += [f"{card}: {verdict(student, teacher, config, world_size, limit)}" for card, limit in CARDS.items()]

    batch = mean_batch(student, config, tokens)
    passes = flops(student, teacher, config, batch)
    figures = [[what, *(parts[part] for part in ("matrices", "attention", "head")), parts.total()]
               for what, parts in passes.items() if parts.total()]
    figures.append(["sum", *(sum(column) for column in list(zip(*figures))[1:])])
    lines += ["", *columns([["TFLOPs per step", "matrices", "attention", "head", "sum"],
                            *([what, *(f"{figure / 1e12:,.1f}" for figure in row)] for what, *row in figures)])]

    counted = steps is not None
    steps = steps if counted else paper_steps(config)
    hours = gpu_hours(passes, steps, config)
    lines += [f"{steps:,} steps of {batch.rows * batch.tokens:,.0f} tokens, {3600 * hours / world_size / steps:.1f} s each: "
              f"{hours / world_size:,.1f} hours, {hours:,.0f} GPU-hours", "", "assumed"]
    if not counted and not config.max_steps:
        lines += [f"  steps: the paper's {stage.rows:,} rows" + (f", {config.epochs} times" if config.epochs > 1 else "")]
    lines += [f"  memory: every row has max_length={config.max_length} positions; GB are 10^9 bytes, of which {OVERHEAD / 1e9} "
              "are CUDA's, NCCL's and cuBLAS's",
              f"  time: a row has {batch.tokens:.0f} positions" + ("" if tokens else f" ({student.config.image_tokens} of an "
              f"image, {stage.text} of text)") + f", {batch.learned / batch.rows:.0f} of them learned from; A100s at "
              f"{UTILISATION:.0%} of {PEAK_FLOPS[config.dtype] / 1e12:.0f} TFLOP/s; none for reading and saving"]
    if config.teacher_cache:
        lines += ["  the teacher's forward: once, to fill teacher_cache; a second run with the same cache is without it"]
    return "\n".join(lines)


def parameter_rows(student: Llava, teacher: Llava | None) -> list[list[str]]:
    text, rows = student.config.text, []
    parts = {part: list(getattr(student, part).parameters()) for part in ("vision", "adaptor", "decoder")}
    experts = [p for name, p in student.named_parameters() if ".experts." in name]
    for part, parameters in [*parts.items(), ("of these, experts", experts)]:
        idle = 0
        if part in ("decoder", "of these, experts") and experts:
            idle = count(experts) * (text.num_experts - text.top_k) // text.num_experts
        rows.append([part, count(parameters), count(parameters) - idle, count(p for p in parameters if p.requires_grad)])
    if teacher is not None:
        theirs = count(teacher.adaptor.parameters()) + count(teacher.decoder.parameters())
        rows.append(["teacher, adaptor and decoder", theirs, theirs, 0])
    return [[what, *(f"{number:,}" for number in row)] for what, *row in rows]


def columns(rows: list[list[str]]) -> list[str]:
    """The first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows]


def table(world_size: int = 16) -> str:
    """The whole recipe, stage by stage, for the paper's four students and their teachers."""
    here, families = Path(__file__).parent / "config", {
        "Qwen/Qwen1.5-7B": ["Qwen/Qwen1.5-0.5B", "Qwen/Qwen1.5-1.8B"], "Qwen/Qwen2-7B": ["Qwen/Qwen2-0.5B", "Qwen/Qwen2-1.5B"]}
    lines = ["| model | stage | GB per GPU (rows a pass) | fits | PFLOPs per step | steps | A100-hours |", "|---|---|--:|---|--:|--:|--:|"]
    for teacher, students in families.items():
        new = [f"--vision={TOWER}", f"--llm={teacher}"]
        runs = {teacher: [["teacher_align", *new], ["teacher_sft", f"--student={teacher}", "--parallel=fsdp"]]}
        for student in students:
            new = [f"--vision={TOWER}", f"--llm={student}"]
            pair = [f"--student={student}", f"--teacher={teacher}"]
            runs[student] = [["align", *new], *([stage, *pair] for stage in ("d2d", "d2s", "pd"))]
        for model, stages in runs.items():
            sum_of_hours = 0
            for name, *flags in stages:
                config = load_config(DEFAULTS, [str(here / f"{name}.py"), *flags])
                learner, frozen = build(config)
                used = sum(memory(learner, frozen, config, world_size, worst_batch(config, config.micro_batch_size)).values())
                fits = ", ".join(card for card, limit in CARDS.items() if used <= limit) or "neither"
                passes, steps = flops(learner, frozen, config, mean_batch(learner, config, None)), paper_steps(config)
                petaflops = sum(parts.total() for parts in passes.values()) / 1e15
                hours = gpu_hours(passes, steps, config)
                sum_of_hours += hours
                settings = f"{config.micro_batch_size}" + ", fsdp" * (config.parallel == "fsdp") + ", checkpointing" * config.checkpointing
                lines.append(f"| {model.removeprefix('Qwen/')} | {name} | {used / 1e9:.0f} ({settings}) | {fits} | {petaflops:.1f} | "
                             f"{steps:,} | {hours:.0f} |")
            lines.append(f"| **{model.removeprefix('Qwen/')}** | **sum** | | | | | **{sum_of_hours:.0f}** |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
