"""
What a run will take, worked out before it starts: memory per GPU, arithmetic per step, hours. No weights, no GPU.

    python train.py config/d2s.py --dry_run=True --student=Qwen/Qwen1.5-1.8B --teacher=Qwen/Qwen1.5-7B
    python plan.py                        the README's table: every stage of the paper's four students, in Markdown

Memory has two halves. What stands there all the time grows with the model:

    a parameter that learns    4 bytes of weight + 4 of gradient + 8 of Adam's two moments, all fp32   = 16
    a frozen parameter         2 bytes, bf16, and nothing else: this is why a 7B teacher is cheaper than a 1B student

What comes and goes with a pass grows with its tokens: each operation keeps whatever its own derivative will ask for. A
matrix product keeps its input if the matrix learns, SiLU and "times" keep their inputs in any case, attention keeps q, k,
v, its output and one number per row (never the T x T scores), a norm keeps its input in fp32. Checkpointing keeps the
input of each block alone and computes the block again when the backward gets there: time for memory.

Arithmetic is nearly all matrix products. One vector times a matrix of n numbers is n multiplications and n additions:

    2n FLOPs forward; 2n backward for the gradient of the vector; 2n backward for the gradient of the matrix

The last only if the matrix learns, the middle one only if something before it does. Here the adaptor always learns and
stands before the decoder, so freezing the decoder saves a third of the arithmetic, not two. Attention adds T x T dot
products per head, half of which causality spares. Norms, rotations, softmax cost time too, but few FLOPs; they are part
of why GPUs reach UTILISATION and not 1.

Models are built on torch's meta device: shapes and dtypes without numbers. What can be counted off them is counted.
Letters as in model.py. GB are 10^9 bytes.
"""
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import Config, load_config
from model import (DECODERS, Block, CheckpointError, DecoderConfig, Llava, LlavaConfig, VisionConfig, read_decoder_config,
                   read_json, read_vision_config)
from moe import SparseFFN, sparse_layers
from train import DEFAULTS, choose_trainable

# Assumptions. Every report prints those it uses.
PEAK_FLOPS = 312e12       # of an A100 in bf16, a second
UTILISATION = 0.4         # the share of it that training reaches
OVERHEAD = 1.5e9          # bytes: CUDA context, NCCL's and cuBLAS's buffers
CARDS = {40: 40e9, 80: 80e9}   # they hold 42.9 and 85.9e9 bytes; the difference is left to the allocator's fragments
CHUNK = 256               # tokens whose logits exist at a time, losses.by_chunks on a GPU
PAPER_HOURS = 960         # A100 hours of the paper's 2B student, all stages, without the teacher


class Stage(NamedTuple):
    """What the paper's data for a stage looks like: its rows, and guesses at what an average one holds besides its image."""
    rows: int             # in pd: pairs
    text: int             # tokens, system prompt and question included; in pd: of one of the two answers
    response: int         # of these, tokens that are learned from


STAGES = {
    "align": Stage(558_128, 75, 25),      # one short caption
    "sft": Stage(665_298, 300, 150),      # LLaVA-1.5's mixture, with which the teacher is tuned
    "d2d": Stage(2_400_000, 250, 180),    # long captions, some dialogues
    "d2s": Stage(1_400_000, 250, 130),    # short answers, several to an image
    "pd": Stage(83_132, 160, 100),        # RLAIF-V
}


class Batch(NamedTuple):
    """The rows of a pass or of a step, as far as cost goes."""
    rows: int             # sequences in the decoder; in pd two for each pair
    tokens: float         # T
    learned: float        # tokens that the head is applied to, over all rows
    pictures: int         # images through the ViT; in pd the two rows of a pair share theirs

    @classmethod
    def of(cls, config: Config, items: int, tokens: float, learned: float) -> "Batch":
        """`items` rows, or pairs, of one image each."""
        rows = 2 * items if config.stage == "pd" else items
        return cls(rows, tokens, rows * learned, items)


# -----------------------------------------------------------------------------
# The models, without weights

def describe(name: str) -> LlavaConfig:
    """A LLaVA folder, of which config.json is enough, or a name of DECODERS with CLIP-L/14-336 before it."""
    if name in DECODERS:
        return LlavaConfig(VisionConfig(), replace(DECODERS[name]), 151646, 151647, None, None)
    path = Path(name) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{name}: neither a checkpoint folder (there is no {path}) nor, for a dry run, one of "
                              f"{', '.join(DECODERS)}")
    config = read_json(path)
    if not isinstance(config.get("vision_config"), dict) or not isinstance(config.get("text_config"), dict):
        return LlavaConfig(VisionConfig(), read_decoder_config(path, config), 0, 0, None, None)
    vision = read_vision_config(path, config["vision_config"])
    vision.feature_layer = config.get("vision_feature_layer", -2)
    return LlavaConfig(vision, read_decoder_config(path, config["text_config"]), 0, 0, None, None)


def build(config: Config) -> tuple[Llava, Llava | None]:
    """Student and teacher of a run on the meta device, with what learns marked and everything in its dtype."""
    dtype = getattr(torch, config.dtype)
    shape = describe(config.student or config.llm)
    if config.stage in ("d2s", "pd") and not shape.text.num_experts:     # what moe.upcycle will make of it
        layers = config.moe_layers if not config.moe_layers[:1].isdigit() else [int(i) for i in config.moe_layers.split(",")]
        shape.text = replace(shape.text, num_experts=config.num_experts, top_k=config.top_k,
                             sparse_layers=sparse_layers(layers, shape.text.n_layer))
    with torch.device("meta"):
        student = Llava(shape)
        teacher = Llava(describe(config.teacher)).to(dtype).requires_grad_(False) if config.teacher else None
    choose_trainable(student, config, dtype)
    if teacher is not None and teacher.config.vision == student.config.vision:
        teacher.vision = student.vision                              # as in train.py, if the weights agree as well
    return student, teacher


# -----------------------------------------------------------------------------
# Memory, in bytes per GPU

def memory(student: Llava, teacher: Llava | None, config: Config, world_size: int, batch: Batch) -> dict[str, float]:
    """Bytes on the fullest GPU while it works on the micro-batch `batch`, by item."""
    size = lambda parameters: sum(p.numel() * p.element_size() for p in parameters)
    learns = [p for p in student.parameters() if p.requires_grad]
    half = getattr(torch, config.dtype).itemsize
    ours = {id(p) for p in student.parameters()}
    sharded = world_size if config.get("parallel", "ddp") == "fsdp" else 1

    items = {
        "weights that learn, fp32": size(learns) / sharded,
        "frozen weights of the student": size(p for p in student.parameters() if not p.requires_grad),
        "teacher": size(p for p in teacher.parameters() if id(p) not in ours) if teacher else 0,
        "gradients, fp32": 4 * sum(p.numel() for p in learns) / sharded,
        "Adam's moments, fp32": 8 * (sum(p.numel() for p in learns) / world_size if config.get("parallel", "ddp") == "fsdp"
                                     else largest_share([p.numel() for p in learns], world_size)),
        "bf16 copies of what learns": copied(student, half),
        "activations": activations(student, batch, config.get("checkpointing", False), half),
    }
    # These follow one another, so only the largest counts.
    passing = {"in the ViT or the teacher": frozen_pass(student, teacher, batch, half) - items["activations"],
               "in the loss": loss_work(student, teacher, teacher is not None and config.stage != "pd", batch, half),
               "in one block's backward": block_work(student, batch, config.get("checkpointing", False), half)}
    largest = max(passing, key=passing.get)
    items[f"working memory ({largest})"] = passing[largest]
    items["CUDA, NCCL, cuBLAS"] = OVERHEAD
    return items


def largest_share(sizes: list[int], world_size: int) -> int:
    """Numbers on the fullest rank when whole parameters are dealt out, largest first, each to the emptiest rank.

    That is what ZeroRedundancyOptimizer does. One embedding can be more than a fair share.
    """
    ranks = [0] * world_size
    for size in sorted(sizes, reverse=True):
        emptiest = ranks.index(min(ranks))
        ranks[emptiest] += size
    return max(ranks)


def copied(student: Llava, half: int) -> float:
    """autocast casts each fp32 weight once a pass and keeps the copy; not embeddings (looked up) and routers (fp32)."""
    head = student.decoder.head_weight                               # the loss casts it for itself, see loss_work
    return sum(half * p.numel() for name, p in student.named_parameters()
               if p.dtype.itemsize > half and ".router." not in name and "norm" not in name and "embedding" not in name
               and p is not head)


def activations(student: Llava, batch: Batch, checkpointing: bool, half: int) -> float:
    """What the forward keeps for the backward."""
    blocks, adaptor, D = student.decoder.blocks, student.adaptor, student.config.text.n_embd
    patches = batch.rows * student.config.image_tokens
    stream = stream_bytes(student)
    saved = half * patches * (adaptor.linear_1.in_features + 2 * D)  # the adaptor's input, before and after GELU
    per_token = 4 * D                                                # the last norm's input
    for block in blocks:
        per_token += stream * D if checkpointing else saved_by_block(block, stream, half)
    return saved + batch.rows * batch.tokens * per_token


def stream_bytes(student: Llava) -> int:
    """Bytes per number of the residual stream: it has the dtype of the embedding, fp32 if that learns."""
    return student.decoder.embedding.weight.element_size()


def saved_by_block(block: Block, stream: int, half: int) -> float:
    """Bytes per token that a block's forward keeps for its backward."""
    attn, ffn = block.attn, block.ffn
    D, q, kv = attn.q_proj.in_features, attn.q_proj.out_features, attn.k_proj.out_features

    def inputs(*linears) -> int:
        """Products keep their input if they learn. They share it, unless each had to cast it for itself."""
        learn = sum(linear.weight.requires_grad for linear in linears)
        return half * linears[0].in_features * (learn if stream != half else min(learn, 1))

    saved = 4 * D + 4 * D                                            # the inputs of both norms
    saved += inputs(attn.q_proj, attn.k_proj, attn.v_proj)
    saved += half * (q + 2 * kv + q) + 4 * attn.n_head               # q, k, v, output (o_proj's input as well), log-sum-exp
    if not isinstance(ffn, SparseFFN):
        return saved + inputs(ffn.gate_proj, ffn.up_proj) + ffn_wide(ffn, half)
    expert, A = ffn.experts[0], ffn.top_k
    saved += 4 * D if ffn.router.weight.requires_grad else 0         # the router's input, fp32
    saved += A * (inputs(expert.gate_proj) + half * D)               # what goes into and comes out of the experts
    return saved + A * ffn_wide(expert, half)


def ffn_wide(ffn, half: int) -> int:
    """gate, silu(gate), up; and their product, if down_proj learns."""
    return half * ffn.gate_proj.out_features * (4 if ffn.down_proj.weight.requires_grad else 3)


def block_work(student: Llava, batch: Batch, checkpointing: bool, half: int) -> float:
    """While the backward is inside a block: what was computed again, and gradients that are on their way."""
    stream, D, per_token = stream_bytes(student), student.config.text.n_embd, 0
    for block in student.decoder.blocks:
        if isinstance(block.ffn, SparseFFN):
            work = (4 + half) * block.ffn.top_k * D + (4 + 3 * half) * D   # experts' outputs, weighted, added up; their input
        else:                                                        # six FFN-wide tensors, some of which were kept anyway
            work = 6 * half * block.ffn.gate_proj.out_features - ffn_wide(block.ffn, half)
        work += stream * D - 4 * D                                   # the stream's gradient; the last norm's input is gone
        if checkpointing:                                            # an fp32 block input is the norm's, and was kept
            work += saved_by_block(block, stream, half) - (4 * D if stream == 4 else 0)
        per_token = max(per_token, work)
    return batch.rows * batch.tokens * per_token


def loss_work(student: Llava, teacher: Llava | None, kl: bool, batch: Batch, half: int) -> float:
    """The loss: head, softmax and their gradients for CHUNK tokens at a time."""
    head = student.decoder.head_weight
    V, D = head.shape
    hidden = half * batch.learned * 2 * D                            # what the head reads, and its gradient
    if teacher is not None:
        hidden += half * batch.learned * teacher.config.text.n_embd
    weight = (4 + half) * head.numel() if head.requires_grad else 0  # its gradient so far, and its copy in bf16
    # logits, their fp32 copy, its log-softmax, and a gradient; for the KL another log-softmax, the teacher's, and their product
    per_logit = 32 if kl else 16
    return hidden + weight + min(CHUNK, batch.learned) * V * per_logit


def frozen_pass(student: Llava, teacher: Llava | None, batch: Batch, half: int) -> float:
    """Without gradients nothing is kept: one block's inner tensors at a time."""
    vision = student.config.vision
    work = half * batch.pictures * (vision.patches + 1) * (3 * vision.ffn + 4 * vision.n_embd)
    if teacher is not None:
        text = teacher.config.text
        work = max(work, batch.rows * batch.tokens * (half * (3 * text.ffn + 3 * text.n_embd) + 4 * text.n_embd))
    return work


# -----------------------------------------------------------------------------
# Arithmetic, in FLOPs for the whole of `batch`

def products(llava: Llava, batch: Batch):
    """Every matrix in the order of the forward: (name, part, parameter, how many vectors it multiplies)."""
    vision, text = llava.config.vision, llava.config.text
    last = vision.n_layer + 1 + vision.feature_layer                 # ViT blocks that run
    head = llava.decoder.head_weight
    for name, p in llava.named_parameters():
        if name.startswith("vision."):
            runs = "patch_embedding" in name or (".blocks." in name and int(name.split(".")[2]) < last)
            vectors = batch.pictures * (vision.patches + (".blocks." in name)) * runs
            part = "ViT"
        elif name.startswith("adaptor."):
            part, vectors = "adaptor", batch.rows * vision.patches
        elif p is head:
            part, vectors = "head", batch.learned
        elif ".experts." in name:
            part, vectors = "blocks", batch.rows * batch.tokens * text.top_k / text.num_experts
        else:
            part, vectors = "blocks", batch.rows * batch.tokens * (".blocks." in name)
        yield name, part, p, vectors if p.ndim > 1 else 0


def attention_flops(config: DecoderConfig | VisionConfig, layers: int, sequences: int, T: float, causal: bool) -> float:
    """q . k and weights x v: two products of T x T x D per layer."""
    return layers * sequences * 2 * 2 * T * T * config.n_embd * (0.5 if causal else 1)


def flops(student: Llava, teacher: Llava | None, config: Config, batch: Batch) -> dict[str, Counter]:
    """For each pass over `batch` the FLOPs of its parts."""
    vision, text = student.config.vision, student.config.text
    passes = {name: Counter() for name in ("ViT", "teacher forward", "student forward", "student backward", "recomputation")}

    layers = vision.n_layer + 1 + vision.feature_layer
    towers = 1 if teacher is None or teacher.vision is student.vision else 2
    quadratic = attention_flops(vision, layers, batch.pictures, vision.patches + 1, causal=False)
    passes["ViT"]["attention"] = towers * quadratic

    upstream = False                                                 # does anything before this matrix learn?
    for name, part, p, vectors in products(student, batch):
        product = 2 * p.numel() * vectors
        if part == "ViT":
            passes["ViT"]["matrices"] += towers * product
            continue
        passes["student forward"][part] += product
        passes["student backward"][part] += product * (upstream + p.requires_grad)
        upstream |= p.requires_grad
        last_of_block = name.endswith(".ffn.down_proj.weight")       # nothing after it is kept: not computed again
        if config.get("checkpointing", False) and part == "blocks" and not last_of_block:
            passes["recomputation"][part] += product
    quadratic = attention_flops(text, text.n_layer, batch.rows, batch.tokens, causal=True)
    passes["student forward"]["attention"] = quadratic
    passes["student backward"]["attention"] = 2.5 * quadratic        # scores again, then the gradients of v, weights, q, k
    if config.get("checkpointing", False):
        passes["recomputation"]["attention"] = quadratic
    if teacher is not None:
        for name, part, p, vectors in products(teacher, batch):
            passes["teacher forward"][part] += 2 * p.numel() * vectors * (part != "ViT")
        theirs = teacher.config.text
        passes["teacher forward"]["attention"] = attention_flops(theirs, theirs.n_layer, batch.rows, batch.tokens, causal=True)
    return passes
