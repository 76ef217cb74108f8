"""
What a run will take, computed before it starts: memory per GPU, FLOPs, hours. Needs neither weights nor a GPU.

    WORLD_SIZE=16 python -m tools.plan config/d2s.py --student=Qwen/Qwen1.5-1.8B --teacher=Qwen/Qwen1.5-7B
    python -m tools.plan                  the table of docs/scale.md: every stage of the paper's four students
    python -m tools.plan chain            the shipped configs one after the other, and the evaluation

The first line is what `python train.py config/d2s.py --dry_run` prints, too. A student or teacher that is not there yet is
known all the same if it is the out_dir of a config in config/, and so on down to the published models.

Memory has two parts. One is there all the time and grows with the model:

    a trainable parameter    4 bytes of weight + 4 of gradient + 8 of Adam's two moments, all fp32   = 16
    a frozen parameter       2 bytes, bf16: a frozen 7B teacher takes no more than a trainable 1B student

(engine/distributed.py shards the 16 over the ranks.) The other comes and goes with each micro-batch and grows with
its tokens: an operation keeps what its own derivative needs. A matrix product keeps its input if the matrix is
trainable; SiLU and "times" keep theirs in any case; attention keeps q, k, v, its output and one number per row, never
the T x T scores; a norm keeps its input, in fp32. Checkpointing keeps only the input of each block and computes the
block again in the backward: time for memory. The teacher keeps nothing.

Arithmetic is nearly all matrix products. A vector times a matrix of n numbers is n multiplications and n additions:

    2n FLOPs forward; 2n backward for the gradient of the vector; 2n backward for the gradient of the matrix

The last only if the matrix is trainable, the middle one only if something before it is. In every stage the adaptor,
which comes before the decoder, is trainable, so freezing the decoder saves a third of the arithmetic, not two.
Attention adds T x T dot products per head, half of which causality saves. Norms, rotations and softmax are few FLOPs,
yet take time; they are part of why a GPU reaches UTILIZATION and not 1. Neither are affinity and relation: a few
dot products per position, less than a thousandth of a step.

An on-policy step first generates an answer to each row: the prompt once, then token by token, forward only. Those few
FLOPs take long, because every token reads all weights again; the report names that time separately.

Between GPUs, each sends gradients and weights once or several times per step (`communication`). What a GPU does not
hide behind its arithmetic adds to the hours, and depends on the links: BANDWIDTHS.

The models are built on torch's meta device: shapes and dtypes without numbers. Letters as in model.py; GB are 10^9
bytes.
"""
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
from configurator import Config, UserError, run, run_config_file
from engine.chunked import PER_PRODUCT, tokens_per_chunk
from engine.index import parse_sources
from engine.hf import describe_llava, describe_parts, grow_vocabulary, without_weights
from model import FFN, Block, DecoderConfig, Llava, LlavaConfig, RMSNorm, VisionConfig
from moe import SparseFFN
from tools.download import check_manifest
from train import DEFAULTS, FEATURE_WEIGHTS, Objective, choose_trainable, configure, make_sparse, open_rows

# Assumptions. A report prints them.
PEAK_FLOPS = {"bfloat16": 312e12, "float32": 156e12}   # of an A100, per second; fp32 through tf32
UTILIZATION = 0.4              # the share of it that a training step reaches
HEAD_FLOPS = 15e12             # of pd's logits in a bf16 run: fp32, not tf32
BANDWIDTHS = (150e9, 80e9, 20e9)   # bytes per second and GPU between GPUs: what nccl-tests call bus bandwidth. About: NVLink
                               # or eight 200 Gb/s cards per machine; four of them; one
BANDWIDTH = 2.0e12             # bytes per second that an A100 reads, which limits generation
OVERHEAD = 1.5e9               # bytes: CUDA context, buffers of NCCL and cuBLAS
CARDS = {"40 GB": 40e9, "80 GB": 80e9}   # they hold 7% more; that is left to the gaps between tensors
TOWER = "openai/clip-vit-large-patch14-336"
CONFIGS = Path(__file__).parents[1] / "config"
CHAIN = ["teacher_align", "teacher_sft", "align", "d2d", "d2s", "pd"]
# Questions that are answered, and new tokens of an answer; POPE's are 5,127 different ones.
QUESTIONS = {"gqa": (12578, 3), "vizwiz": (4319, 3), "scienceqa": (4241, 2), "textvqa": (5000, 4), "mme": (2374, 2),
             "mmbench": (4329, 2), "mmbench_cn": (4329, 2), "pope": (5127, 2), "objhal": (300, 150)}

# The base models of the paper and their successors (read off their published config.json), by their names on the Hub,
# matched exactly.
DECODERS = {
    "Qwen/Qwen1.5-0.5B": DecoderConfig(n_embd=1024, n_layer=24, n_head=16, n_kv_head=16, n_ffn=2816, tied=True),
    "Qwen/Qwen1.5-1.8B": DecoderConfig(n_embd=2048, n_layer=24, n_head=16, n_kv_head=16, n_ffn=5504),
    "Qwen/Qwen1.5-4B": DecoderConfig(n_embd=2560, n_layer=40, n_head=20, n_kv_head=20, n_ffn=6912, rope_theta=5e6),
    "Qwen/Qwen1.5-7B": DecoderConfig(n_embd=4096, n_layer=32, n_head=32, n_kv_head=32, n_ffn=11008),
    "Qwen/Qwen2-0.5B": DecoderConfig(n_embd=896, n_layer=24, n_head=14, n_kv_head=2, n_ffn=4864, tied=True,
                                     max_positions=131072),
    "Qwen/Qwen2-1.5B": DecoderConfig(n_embd=1536, n_layer=28, n_head=12, n_kv_head=2, n_ffn=8960, tied=True,
                                     max_positions=131072),
    "Qwen/Qwen2-7B": DecoderConfig(vocab_size=152064, n_embd=3584, n_layer=28, n_head=28, n_kv_head=4, n_ffn=18944,
                                   max_positions=131072),
    "Qwen/Qwen2.5-0.5B": DecoderConfig(n_embd=896, n_layer=24, n_head=14, n_kv_head=2, n_ffn=4864, tied=True),
    "Qwen/Qwen2.5-1.5B": DecoderConfig(n_embd=1536, n_layer=28, n_head=12, n_kv_head=2, n_ffn=8960, tied=True,
                                       max_positions=131072),
    "Qwen/Qwen2.5-3B": DecoderConfig(n_embd=2048, n_layer=36, n_head=16, n_kv_head=2, n_ffn=11008, tied=True),
    "Qwen/Qwen2.5-7B": DecoderConfig(vocab_size=152064, n_embd=3584, n_layer=28, n_head=28, n_kv_head=4, n_ffn=18944,
                                     max_positions=131072),
    "Qwen/Qwen3-0.6B-Base": DecoderConfig(n_embd=1024, n_layer=28, n_head=16, n_kv_head=8, n_ffn=3072, tied=True, head_dim=128,
                                          qk_norm=True),
    "Qwen/Qwen3-1.7B-Base": DecoderConfig(n_embd=2048, n_layer=28, n_head=16, n_kv_head=8, n_ffn=6144, tied=True, head_dim=128,
                                          qk_norm=True),
    "Qwen/Qwen3-4B-Base": DecoderConfig(n_embd=2560, n_layer=36, n_head=32, n_kv_head=8, n_ffn=9728, tied=True, head_dim=128,
                                        qk_norm=True),
    "Qwen/Qwen3-8B-Base": DecoderConfig(n_embd=4096, n_layer=36, n_head=32, n_kv_head=8, n_ffn=12288, head_dim=128, qk_norm=True),
}


class Stage(NamedTuple):
    """The paper's data of a stage: the number of rows, and our guess of an average row without its image."""
    rows: int                  # in pd: pairs
    text: int                  # tokens, system prompt and question included; in pd with one of the two answers
    response: int              # those of them that the loss is taken over


STAGES = {
    "align": Stage(558_128, 75, 25),       # one short caption each
    "sft": Stage(665_298, 300, 150),       # LLaVA-1.5's mixture, which the teacher is tuned with
    "d2d": Stage(2_400_000, 250, 180),     # long captions, some dialogues
    "d2s": Stage(1_400_000, 250, 130),     # short answers, several to an image
    "pd": Stage(83_132, 160, 100),         # RLAIF-V
}


class Batch(NamedTuple):
    """The size of a micro-batch or of a whole batch."""
    rows: int                  # sequences in the decoder; in pd two for each pair
    tokens: float              # T
    targets: float             # tokens that the head is applied to, of all rows together
    images: int                # through the ViT; in pd both rows of a pair show the same
    prompt: float              # positions before the answer, which an on-policy step replaces

    @classmethod
    def of(cls, config: Config, items: int, tokens: float, targets: float, response: float | None = None) -> "Batch":
        """`items` rows, in pd pairs, one image each. Per row: `targets`, `response` of them in answers (None: all)."""
        rows = 2 * items if config.stage == "pd" else items
        return cls(rows, tokens, rows * targets, items, tokens - (targets if response is None else response))


# -----------------------------------------------------------------------------
# The models, without weights

def build(config: Config) -> tuple[Llava, Llava | None]:
    """Student and teacher of a run on the meta device, in their dtypes, with requires_grad set."""
    dtype = getattr(torch, config.dtype)
    student = describe(config.student) if config.student else describe_new(config)
    if config.stage in ("d2s", "pd") and not student.config.decoder.num_experts:
        if config.stage == "pd" and is_folder(config.student):
            raise UserError(f"{config.student}: is dense, and stage pd trains experts; run stage d2s first")
        make_sparse(student, config)
    choose_trainable(student, config, dtype)
    if not config.teacher:
        return student, None
    teacher = describe(config.teacher).to(dtype).requires_grad_(False)
    if teacher.config.vision == student.config.vision:
        teacher.vision = student.vision                              # as in train.py, where the weights must agree too
    return student, teacher


def describe(name: str) -> Llava:
    """A LLaVA folder, its weights not read; else what a shipped config will make; else a published decoder, behind CLIP-L/14-336."""
    if is_folder(name):
        return describe_llava(Path(name))
    maker = next((path for path in sorted(CONFIGS.glob("*.py")) if run_config_file(str(path)).get("out_dir") == name), None)
    if maker is not None:
        return build(configure([str(maker)]))[0].float()
    if published(name) not in DECODERS:
        raise UserError(f"{name}: is neither a checkpoint folder (it has no config.json) nor, for a dry run, one of "
                        f"{', '.join(DECODERS)}")
    text = replace(DECODERS[published(name)])
    with without_weights():
        return Llava(LlavaConfig(VisionConfig(), text, image_token_id=151646, pad_token_id=151647, eos_token_id=None,
                                 template=None))


def describe_new(config: Config) -> Llava:
    """A new model: a CLIP folder and a Qwen folder, else their published names."""
    if is_folder(config.vision) and is_folder(config.llm):
        llava = describe_parts(Path(config.vision), Path(config.llm), config.template or "vicuna")
        grow_vocabulary(llava, max(llava.config.image_token_id, llava.config.pad_token_id) + 1)
        return llava
    if published(config.vision) != TOWER:
        raise UserError(f"{config.vision}: is not {TOWER}, the one tower that a dry run knows without its folder")
    return describe(published(config.llm))


def is_folder(name: str) -> bool:
    return (Path(name) / "config.json").is_file()


def published(path: str) -> str:
    """weights/Qwen/Qwen1.5-1.8B -> Qwen/Qwen1.5-1.8B: folders are named as on the Hub."""
    return "/".join(Path(path).parts[-2:])


def hidden_map(student: Llava, teacher: Llava | None, config: Config) -> list[torch.nn.Parameter]:
    """The parameters of the map from the student's to the teacher's width; none without hidden_weight."""
    if teacher is None or not config.hidden_weight:
        return []
    with torch.device(student.decoder.embedding.weight.device):
        return list(Objective(student, config, teacher.config.decoder.n_embd).hidden_map.parameters())


# -----------------------------------------------------------------------------
# Memory, in bytes per GPU. `half`: bytes of a number in matrix products. `stream`: bytes of a number in the residual
# stream, which has the dtype of the embedding, fp32 where that is trainable.

def memory(student: Llava, teacher: Llava | None, config: Config, world_size: int, batch: Batch) -> dict[str, float]:
    """Item by item what the fullest GPU holds at the worst moment of its work on the micro-batch `batch`."""
    half, stream = getattr(torch, config.dtype).itemsize, student.decoder.embedding.weight.element_size()
    mapping = hidden_map(student, teacher, config)
    own = [p for p in student.parameters() if p.requires_grad]
    trainable = own + mapping
    vit = size_of(student.vision.parameters())
    if config.parallel == "fsdp" and world_size > 1:                 # shards all but the ViT and the teacher
        shards, adam, stream = world_size, count(trainable) / world_size, half
        copies, last_gradients, in_flight = gathered(student, mapping, half)
        freed = dropped = 0
    else:
        shards, adam = 1, largest_shard(trainable, world_size)
        copies = autocast_copies(student, half) + (half * count(mapping) if half < 4 else 0)
        last_gradients, in_flight = embedding_gradient(student), 0
        # Copies are freed when autocast ends, after the forward, or when the backward has used them. With checkpointing
        # a block that is computed again makes its own once more.
        freed = copies
        dropped = copies - max(autocast_copies(block, half) for block in [*student.decoder.blocks, student.adaptor])
        largest = max(p.numel() * p.requires_grad for p in student.decoder.blocks.parameters())
        in_flight += (4 + half) * largest * (half < 4)               # the gradient of a matrix, before and after its cast

    kept = activations(student, batch, config.checkpointing, half, stream)
    moments = {                                                      # one after the other, so only the worst counts
        "the loss": loss_work(student, teacher, config, batch, half),
        "the features": feature_work(student, teacher, config, batch, half),
        "a block's backward": (block_work(student, batch, config.checkpointing, half, stream) + in_flight
                               - dropped * config.checkpointing),
        "the end of the backward": last_gradients - kept - freed,
    }
    worst = max(moments, key=moments.get)
    items = {
        "trainable weights, fp32": 4 * count(trainable) / shards,
        "frozen weights": vit + (size_of(student.parameters()) - 4 * count(own) - vit) / shards,
        "teacher": 0,
        "gradients, fp32": 4 * count(trainable) / shards,
        "Adam's moments, fp32": 8 * adam,
        "low-precision copies of weights": copies,
        "activations": kept,
        **teacher_states(teacher, config, batch, half),
        f"working memory ({worst})": moments[worst],
        "CUDA, NCCL, cuBLAS": OVERHEAD,
    }
    if teacher is not None and not config.teacher_cache:
        items["teacher"] = size_of(teacher.parameters()) - (vit if teacher.vision is student.vision else 0)
    return items


def count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def size_of(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def largest_shard(parameters: list[torch.Tensor], world_size: int) -> int:
    """How many numbers the busiest rank updates: ZeroRedundancyOptimizer deals out whole parameters, the largest first,
    each to the rank with the least. One embedding can be more than a fair share."""
    ranks = [0] * world_size
    for size in sorted((p.numel() for p in parameters), reverse=True):
        ranks[ranks.index(min(ranks))] += size
    return max(ranks)


def autocast_copies(module: torch.nn.Module, half: int) -> float:
    """autocast casts each fp32 matrix when it is first used, and keeps the copy for later uses."""
    # But not norms and routers, which stay fp32; embeddings, which are looked up; the head, see loss_work.
    others = ("norm.", "router.", "embedding.", "lm_head.")
    return half * count(p for name, p in module.named_parameters()
                        if p.element_size() > half and not any(other in name for other in others))


def embedding_gradient(student: Llava) -> int:
    """As large as the embedding, however few rows were looked up. Tied: the head's, the embedding's and their sum."""
    embedding = student.decoder.embedding.weight
    return 4 * embedding.numel() * (3 if student.config.decoder.tied else 1) if embedding.requires_grad else 0


def activations(student: Llava, batch: Batch, checkpointing: bool, half: int, stream: int) -> float:
    """What the forward keeps for the backward."""
    D, Dv = student.config.decoder.n_embd, student.config.vision.n_embd
    per_patch = half * (Dv + 2 * D) + stream * D                     # the adaptor's input, before and after GELU, its output
    per_token = 4 * D                                                # the last norm's input
    for block in student.decoder.blocks:
        per_token += stream * D if checkpointing else kept_by_block(block, half)
    return batch.rows * (student.config.image_tokens * per_patch + batch.tokens * per_token)


def kept_by_block(block: Block, half: int) -> float:
    """Bytes per token."""
    attn, ffn = block.attn, block.ffn
    D, q, kv = attn.q_proj.in_features, attn.q_proj.out_features, attn.k_proj.out_features

    def input_of(*linears) -> int:
        """Kept once if any of the matrices that share it is trainable."""
        return half * D * any(linear.weight.requires_grad for linear in linears)

    kept = 4 * D + input_of(attn.q_proj, attn.k_proj, attn.v_proj)   # the first norm's input, and its output
    kept += half * (q + kv + kv + q) + 4 * attn.n_head               # q, k, v, o_proj's input; log-sum-exp of each row
    kept += 4 * (q + kv) * isinstance(attn.q_norm, RMSNorm)          # Qwen3: their norms' input
    kept += 4 * D                                                    # the second norm's input
    if not isinstance(ffn, SparseFFN):
        return kept + input_of(ffn.gate_proj, ffn.up_proj) + kept_by_ffn(ffn, half)
    expert, A = ffn.experts[0], ffn.top_k
    kept += 4 * D                                                    # the router's input, fp32
    return kept + A * (input_of(expert.gate_proj) + kept_by_ffn(expert, half) + half * D)   # and A experts' output


def kept_by_ffn(ffn: FFN, half: int) -> int:
    """gate, silu(gate), up, and their product if down_proj is trainable."""
    return half * ffn.gate_proj.out_features * (4 if ffn.down_proj.weight.requires_grad else 3)


def loss_work(student: Llava, teacher: Llava | None, config: Config, batch: Batch, half: int) -> float:
    """Some tokens' logits, later their gradients, and for a chunk of them what the loss computes."""
    head = student.decoder.head_weight
    V, D = head.shape
    chunk = tokens_per_chunk(V, "cuda")
    if config.stage == "pd":                                         # all in fp32, see train.sequence_logprobs
        half = 4
    work = half * batch.targets * 2 * D                              # the head's input, and its gradient
    per_logit = 12                                                   # log-softmax, its gradients
    if teacher is not None and config.stage != "pd":
        work += half * batch.targets * teacher.config.decoder.n_embd
        if config.kd_weight:                                         # again for the KL; the teacher's; their product
            work += V * half * min(chunk * PER_PRODUCT["cuda"], batch.targets)
            per_logit = {"forward": 24, "reverse": 24, "jsd": 40, "mse": 26}[config.kd_loss]
            per_logit += 10 if config.kd_standardize else 6 if config.kd_temperature != 1 else 0
    work += V * half * min(chunk * PER_PRODUCT["cuda"], batch.targets)
    work += V * per_logit * min(chunk, batch.targets)
    return work + 4 * V * D * head.requires_grad                     # the head's gradient so far


def feature_work(student: Llava, teacher: Llava | None, config: Config, batch: Batch, half: int) -> float:
    """The losses on hidden states, after the loss of tokens has left the gradients of its inputs."""
    if not any(config[key] for key in FEATURE_WEIGHTS):
        return 0
    head = student.decoder.head_weight
    (V, D), wide = head.shape, teacher.config.decoder.n_embd
    left = half * batch.targets * D + 4 * V * D * head.requires_grad
    mapped = related = 0
    if config.hidden_weight:                 # the map's input and outputs; in fp32 both sides, difference and square
        mapped = mapped_tokens(config, batch) * (half * D + (4 * half + 16) * wide)
    images = batch.images * student.config.image_tokens              # fp32 states, and the normalized ones
    related += 8 * D * (images + batch.targets) * bool(config.affinity_weight)
    related += 8 * D * images * bool(config.relation_weight)
    return left + max(mapped, related)                               # one after the other, and little of it is kept


def teacher_states(teacher: Llava | None, config: Config, batch: Batch, half: int) -> dict[str, float]:
    """Its last hidden states, which the features keep until the micro-batch is done."""
    if not any(config[key] for key in FEATURE_WEIGHTS):
        return {}
    return {"activations: the teacher's states": half * batch.rows * batch.tokens * teacher.config.decoder.n_embd}


def mapped_tokens(config: Config, batch: Batch) -> float:
    return batch.rows * batch.tokens if config.hidden_tokens == "all" else batch.targets


def block_work(student: Llava, batch: Batch, checkpointing: bool, half: int, stream: int) -> float:
    """While the backward is inside a block: gradients on their way, and what was computed again."""
    D, worst = student.config.decoder.n_embd, 0
    for block in student.decoder.blocks:
        if isinstance(block.ffn, SparseFFN):                         # the experts' outputs, weighted, added up
            per_token = (half + 4) * block.ffn.top_k * D + (4 + 3 * half) * D
        else:                                                        # six FFN-wide tensors, some were kept anyway
            per_token = 6 * half * block.ffn.gate_proj.out_features - kept_by_ffn(block.ffn, half)
        per_token += stream * D - 4 * D                              # a gradient, while the last norm's input is gone
        if checkpointing:                                            # of an fp32 stream the norm's input is the block's
            per_token += kept_by_block(block, half) - (4 * D if stream == 4 else 0)
        worst = max(worst, per_token)
    return batch.rows * batch.tokens * worst


def gathered(student: Llava, mapping: list[torch.nn.Parameter], half: int) -> tuple[float, float, float]:
    """What a rank holds beyond its shard with FSDP: all-gathered weights, last gradients, gradients in between."""
    decoder, units = student.decoder, []                             # a unit: what is all-gathered at one time
    for block in decoder.blocks:
        units.append(count(p for name, p in block.named_parameters() if ".experts." not in name))
        units += [count(expert.parameters()) for expert in getattr(block.ffn, "experts", [])]
    root = [decoder.embedding.weight] + [decoder.head_weight] * (not student.config.decoder.tied) + mapping
    weights = half * (count(root) + count(student.adaptor.parameters()) + 2 * max(units))   # this unit and the next
    if not any(p.requires_grad for p in decoder.parameters()):
        return weights, 0, 0
    trainable = count(p for p in root if p.requires_grad)            # their gradients wait, in bf16, and leave last
    return weights, 4 * trainable, 4 * max(units) + half * (decoder.head_weight.numel() if trainable else 0)


# -----------------------------------------------------------------------------
# Arithmetic, in FLOPs for all of `batch`

def flops(student: Llava, teacher: Llava | None, config: Config, batch: Batch) -> dict[str, Counter]:
    """For each pass, the FLOPs of its matrix products ("matrices", "head") and of its attention's T x T products."""
    passes = {what: Counter() for what in ("ViT", "teacher forward", "student forward", "student backward",
                                           "student's blocks again", "generation")}
    for llava, forward in ((student, "student forward"), (teacher, "teacher forward")):
        if llava is None:
            continue
        runs_vit = llava is student or teacher.vision is not student.vision    # a shared ViT encodes an image once
        for _, part, p, vectors in products(llava, batch):
            if part != "ViT":
                unused = llava is teacher and part == "head" and not config.kd_weight and config.stage != "pd"
                passes[forward][part] += 2 * p.numel() * vectors * (not unused)
            elif runs_vit:
                passes["ViT"]["matrices"] += 2 * p.numel() * vectors
        vision, text = llava.config.vision, llava.config.decoder
        if runs_vit:
            per_image = blocks_run(vision) * quadratic(vision.patches + 1, vision.n_embd)
            passes["ViT"]["attention"] += batch.images * per_image
        passes[forward]["attention"] = batch.rows * text.n_layer * quadratic(batch.tokens, text.n_head * text.head_dim) / 2   # causal

    upstream = False                                                 # is anything before this matrix trainable?
    for name, part, p, vectors in products(student, batch):
        passes["student backward"][part] += 2 * p.numel() * vectors * (upstream + p.requires_grad)
        upstream = upstream or p.requires_grad
        ends_block = name.endswith(".ffn.down_proj.weight")          # nothing after it was kept: it is not run again
        if config.checkpointing and ".blocks." in name and part == "matrices" and not ends_block:
            passes["student's blocks again"]["matrices"] += 2 * p.numel() * vectors
    for p in hidden_map(student, teacher, config):
        if p.ndim == 2:
            passes["student forward"]["matrices"] += 2 * p.numel() * mapped_tokens(config, batch)
            passes["student backward"]["matrices"] += 4 * p.numel() * mapped_tokens(config, batch)
    forward = passes["student forward"]["attention"]
    passes["student backward"]["attention"] = 2.5 * forward          # scores again; gradients of v, weights, q, k
    passes["student's blocks again"]["attention"] = forward * config.checkpointing
    if config.on_policy:
        for part, number in generation(student, config.on_policy_tokens, batch).items():
            passes["generation"][part] = config.on_policy * number
    return passes


def generation(student: Llava, new: int, batch: Batch) -> Counter:
    """FLOPs of `new` tokens for each row: the prompt at once, then one by one, the head at every one."""
    parts, vision, text = Counter(), student.config.vision, student.config.decoder
    positions = batch.prompt + new - 1                               # the last token is not read
    for _, part, p, vectors in products(student, batch._replace(tokens=positions, targets=batch.rows * new)):
        parts["matrices" if part == "ViT" else part] += 2 * p.numel() * vectors
    attended = positions * (positions + 1) / 2 - batch.prompt * (batch.prompt + 1) / 2       # by the new tokens
    width = text.n_head * text.head_dim
    per_layer = quadratic(batch.prompt, width) / 2 + 4 * width * attended
    parts["attention"] = batch.rows * text.n_layer * per_layer
    parts["attention"] += batch.images * blocks_run(vision) * quadratic(vision.patches + 1, vision.n_embd)
    return parts


def products(llava: Llava, batch: Batch) -> Iterator[tuple[str, str, torch.Tensor, float]]:
    """(name, part, matrix, how many vectors of the batch it multiplies), in the order of the forward."""
    vision, text, tokens = llava.config.vision, llava.config.decoder, batch.rows * batch.tokens
    for name, p in llava.named_parameters():
        if p is llava.decoder.head_weight:
            yield name, "head", p, batch.targets
        elif p.ndim == 1 or name in ("vision.position_embedding.weight", "decoder.embedding.weight"):
            continue                                                 # added, or looked up
        elif name.startswith("vision.patch_embedding."):
            yield name, "ViT", p, batch.images * vision.patches
        elif name.startswith("vision."):
            runs = int(name.split(".")[2]) < blocks_run(vision)
            yield name, "ViT", p, batch.images * (vision.patches + 1) * runs
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
# Communication, in bytes that each GPU sends per step

def communication(student: Llava, teacher: Llava | None, config: Config, world_size: int) -> dict[str, float]:
    """Each collective of a step. On a ring of W GPUs a broadcast, an all-gather or a reduce-scatter of a tensor sends
    (W - 1) / W of it from each GPU, an all-reduce twice that."""
    if world_size == 1:
        return {}
    share, half = (world_size - 1) / world_size, getattr(torch, config.dtype).itemsize
    mapping = hidden_map(student, teacher, config)
    trainable = count([p for p in student.parameters() if p.requires_grad] + mapping)
    if config.parallel == "ddp":
        return {"gradients: all-reduce": 2 * share * 4 * trainable, "updated weights: broadcast": share * 4 * trainable}
    sharded = count(student.adaptor.parameters()) + count(student.decoder.parameters()) + count(mapping)
    routers = count(p for name, p in student.named_parameters() if ".router." in name)
    blocks = count(student.decoder.blocks.parameters())              # again for the backward; the rest stays gathered
    gathered = half * (sharded + blocks) + 2 * (4 - half) * routers
    return {"weights: all-gather": micro_steps(config, world_size) * share * gathered,
            "gradients: reduce-scatter": micro_steps(config, world_size) * share * 4 * trainable}


def micro_steps(config: Config, world_size: int) -> int:
    return max(1, config.batch_size // (config.micro_batch_size * world_size))


def exposed_seconds(passes: dict[str, Counter], sent: dict[str, float], config: Config, world_size: int,
                    bandwidth: float) -> float:
    """Of a step: how long a GPU waits for communication. FSDP's overlaps with all arithmetic; DDP's all-reduce with the
    backward of the last micro-batch, and its broadcast with nothing."""
    if config.parallel == "fsdp":
        return max(0.0, sum(sent.values()) / bandwidth - gpu_seconds(passes, config) / world_size)
    backward = {what: passes[what] for what in ("student backward", "student's blocks again")}
    hidden = gpu_seconds(backward, config) / world_size / micro_steps(config, world_size)
    reduce, broadcast = (size / bandwidth for size in sent.values()) if sent else (0, 0)
    return max(0.0, reduce - hidden) + broadcast


# -----------------------------------------------------------------------------
# A run: its batches, its steps, its hours

def micro_batch(config: Config, tokens: int) -> Batch:
    """A micro-batch of rows of that length."""
    return Batch.of(config, config.micro_batch_size, tokens, tokens)


def longest_rows(config: Config, longest: int | None = None) -> Batch:
    """A micro-batch of the longest rows: batches are sorted by length, so there will be one."""
    return micro_batch(config, (longest or config.max_length) + config.on_policy_tokens * bool(config.on_policy))


def average_step(student: Llava, config: Config, mean: float | None = None) -> Batch:
    stage, targets = STAGES[config.stage], STAGES[config.stage].response
    if config.teacher and config.stage != "pd":
        targets = {"response": targets, "all": stage.text,
                   "response+image": targets + student.config.image_tokens}[config.kd_tokens]
    tokens = mean or student.config.image_tokens + stage.text
    return Batch.of(config, config.batch_size, tokens, targets, min(stage.response, tokens))


def paper_steps(config: Config) -> int:
    return config.max_steps or config.epochs * STAGES[config.stage].rows // config.batch_size


def gpu_seconds(passes: dict[str, Counter], config: Config) -> float:
    """The arithmetic of `passes` on one GPU."""
    total, head = sum(parts.total() for parts in passes.values()), 0.0
    if config.stage == "pd" and config.dtype == "bfloat16":
        head = sum(parts["head"] for parts in passes.values())
    return (total - head) / (UTILIZATION * PEAK_FLOPS[config.dtype]) + head / HEAD_FLOPS


def generation_seconds(student: Llava, config: Config, world_size: int) -> float:
    """Of an on-policy step at least: each token of each micro-batch reads the decoder's weights."""
    weights = getattr(torch, config.dtype).itemsize * count(student.decoder.parameters())
    return micro_steps(config, world_size) * config.on_policy_tokens * weights / BANDWIDTH


def verdict(student: Llava, teacher: Llava | None, config: Config, world_size: int, longest: int | None,
            room: float) -> str:
    """Does it fit into `room` bytes, and if not, what would?"""
    share = max(1, config.batch_size // world_size)
    for change in ({}, {"checkpointing": True}, {"parallel": "fsdp"}, {"checkpointing": True, "parallel": "fsdp"}):
        for micro in (m for m in range(share, 0, -1) if share % m == 0):
            tried = Config(config, micro_batch_size=micro, **change)
            if sum(memory(student, teacher, tried, world_size, longest_rows(tried, longest)).values()) > room:
                continue
            if not change and micro >= config.micro_batch_size:
                return f"fits, up to micro_batch_size={micro}"
            flags = [f"--{key}={value}" for key, value in {**change, "micro_batch_size": micro}.items()]
            return f"does not fit; {' '.join(flags)} does"
    return "does not fit, not even with checkpointing, fsdp and micro_batch_size=1"


# -----------------------------------------------------------------------------
# The report of one run

def report(config: Config, world_size: int, lengths: np.ndarray | list[int] | None = None,
           steps: int | None = None) -> str:
    """`lengths` of the rows and `steps`: where the data are at hand, else the paper's and our guess."""
    student, teacher = build(config)
    text, stage = student.config.decoder, STAGES[config.stage]
    longest, mean = (int(max(lengths)), float(np.mean(lengths))) if lengths is not None else (None, None)
    step = average_step(student, config, mean)
    sparse = f", {text.num_experts} experts, {text.top_k} active, in {len(text.sparse_layers)} of {text.n_layer} layers"
    lines = [f"stage {config.stage} on {world_size} GPU{'s' * (world_size > 1)}, {config.batch_size} "
             f"{'pairs' if config.stage == 'pd' else 'rows'} a step, {config.micro_batch_size} per GPU and micro-batch",
             f"student {config.student or config.llm}{sparse * bool(text.num_experts)}"
             + f"; teacher {config.teacher}" * bool(config.teacher), ""]
    lines += columns(["parameters", "all", "active per token", "trainable"], parameter_rows(student, teacher, config))

    batches = longest_rows(config, longest), micro_batch(config, round(step.tokens))
    items, average = (memory(student, teacher, config, world_size, batch) for batch in batches)
    sizes = [[item, size / 1e9, other / 1e9] for (item, size), other in zip(items.items(), average.values())]
    heads = ["GB per GPU", *(f"{batch.rows} x {batch.tokens:.0f} positions" for batch in batches)]
    lines += ["", *columns(heads, sizes, sum_up=True)]
    lines += [f"{card}: {verdict(student, teacher, config, world_size, longest, room)}" for card, room in CARDS.items()]

    passes = flops(student, teacher, config, step)
    figures = [[what, *(parts[part] / 1e12 for part in ("matrices", "attention", "head")), parts.total() / 1e12]
               for what, parts in passes.items() if parts.total()]
    lines += ["", *columns(["TFLOPs per step", "matrices", "attention", "head", "all"], figures, sum_up=True)]
    known = steps or config.max_steps
    steps = known or paper_steps(config)
    seconds = gpu_seconds(passes, config) / world_size
    lines += [f"{steps:,} steps of {step.rows * step.tokens:,.0f} positions, {seconds:.2f} s each: "
              f"{steps * seconds / 3600:,.1f} hours, {steps * seconds * world_size / 3600:,.1f} GPU-hours"]
    if sent := communication(student, teacher, config, world_size):
        rows = [[what, size / 1e9, *(size / bandwidth for bandwidth in BANDWIDTHS)] for what, size in sent.items()]
        lines += ["", *columns(["sent by each GPU per step", "GB", *(f"s at {b / 1e9:.0f} GB/s" for b in BANDWIDTHS)], rows,
                               sum_up=True)]
        for bandwidth in BANDWIDTHS:
            wait = exposed_seconds(passes, sent, config, world_size, bandwidth)
            lines += [f"at {bandwidth / 1e9:.0f} GB/s {wait:.2f} s per step are not hidden behind arithmetic: "
                      f"{steps * (seconds + wait) * world_size / 3600:,.1f} GPU-hours"]
    lines += ["", "This assumes"]
    if not known:
        lines += [f"- the {stage.rows:,} rows that the paper has in this stage, for {config.epochs} epoch(s)"]
    if lengths is None:
        lines += [f"- rows of {step.tokens:.0f} positions on average ({student.config.image_tokens} of an image, "
                  f"{stage.text} of text), of max_length at most"]
    lines += [f"- {step.targets / step.rows:.0f} target tokens per row",
              f"- A100s at {UTILIZATION:.0%} of {PEAK_FLOPS[config.dtype] / 1e12:.0f} TFLOP/s, not waiting for data",
              f"- {OVERHEAD / 1e9} GB for CUDA, NCCL and cuBLAS; GB are 10^9 bytes"]
    if config.on_policy:
        seconds = generation_seconds(student, config, world_size)
        lines += [f"- on_policy={config.on_policy}: that share of the steps first generates answers of "
                  f"{config.on_policy_tokens} tokens; reading the weights for each of them at {BANDWIDTH / 1e12} TB/s "
                  f"takes {seconds:.1f} s more in such a step, not in the hours"]
    if config.teacher_cache:
        rows = min(steps * config.batch_size, len(lengths) if lengths is not None else stage.rows)
        size = rows * (8 if config.stage == "pd" else step.targets / step.rows * (8 * config.teacher_top_k + 4))
        once = {what: passes[what] for what in ("ViT", "teacher forward")}
        hours = rows / config.batch_size * gpu_seconds(once, config) / 3600
        lines += [f"- a teacher_cache still to be filled: {rows:,} rows, {size / 1e9:,.1f} GB, {hours:,.1f} GPU-hours; once it is, "
                  "the teacher's forward is saved in every run"]
    if config.compile:
        lines += ["- no more from compile than the time: it also keeps less, which is not counted"]
    return "\n".join(lines)


def parameter_rows(student: Llava, teacher: Llava | None, config: Config) -> list[list]:
    counts, rows = student.count_parameters(), []
    idle = counts["decoder"] - counts["decoder_active"]
    experts = [p for name, p in student.named_parameters() if ".experts." in name]
    for part in ("vision", "adaptor", "decoder"):
        trainable = count(p for p in getattr(student, part).parameters() if p.requires_grad)
        rows.append([part, counts[part], counts[part] - idle * (part == "decoder"), trainable])
    if experts:
        rows.append(["  of it, experts", count(experts), count(experts) - idle, count(experts)])
    if mapping := count(hidden_map(student, teacher, config)):
        rows.append(["map of hidden states", mapping, 0, mapping])
    if teacher is not None:
        size = count(teacher.adaptor.parameters()) + count(teacher.decoder.parameters())
        rows.append(["teacher without its ViT", size, size, 0])
    return rows


def columns(heads: list[str], rows: list[list], sum_up: bool = False) -> list[str]:
    """A table, names flush left, numbers flush right."""
    if sum_up:
        rows = rows + [["sum", *(sum(column) for column in list(zip(*rows))[1:])]]
    text = lambda number: f"{number:,}" if isinstance(number, int) else f"{number:,.2f}"
    cells = [heads] + [[name, *map(text, numbers)] for name, *numbers in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]


def measure_rows(config: Config) -> tuple[np.ndarray | None, int | None]:
    """The lengths of the run's rows and its number of steps, if its data and its tokenizer are on this disk."""
    folder = Path(config.student or config.llm)
    files = [Path(path) for path, _ in parse_sources(config.data)]
    if not (folder / "tokenizer.json").is_file() or not all(file.is_file() for file in files):
        return None, None
    student = describe_llava(folder) if config.student else describe_parts(Path(config.vision), folder,
                                                                           config.template or "vicuna")
    dataset = open_rows(config, student)
    for note in dataset.notes:
        print(note)
    sampler = data.Sampler(dataset.lengths, config.batch_size, 0, dataset.sources, dataset.held_out(config.val_rows))
    return dataset.lengths, config.max_steps or config.epochs * sampler.steps_per_epoch


# -----------------------------------------------------------------------------
# The table of all runs

def table(world_size: int = 16) -> str:
    """The recipe's configs, for the paper's four students and their teachers, in Markdown."""
    heads, rule = table_heads()
    lines = [f"| model {heads}", f"|---{rule}"]
    families = {"Qwen/Qwen1.5-7B": ["Qwen/Qwen1.5-0.5B", "Qwen/Qwen1.5-1.8B"],
                "Qwen/Qwen2-7B": ["Qwen/Qwen2-0.5B", "Qwen/Qwen2-1.5B"]}
    for teacher, students in families.items():
        for model in [teacher, *students]:
            new, pair = [f"--vision={TOWER}", f"--llm={model}"], [f"--student={model}", f"--teacher={teacher}"]
            runs = [["align", *new], *([stage, *pair] for stage in ("d2d", "d2s", "pd"))]
            if model == teacher:
                runs = [["teacher_align", *new], ["teacher_sft", f"--student={model}"]]
            rows = [table_row(name, flags, world_size) for name, *flags in runs]
            lines += [f"| {model} | {cells} |" for cells, _ in rows]
            lines.append(f"| {model} | all | | | | | | {hours_cells([sum(column) for column in zip(*(h for _, h in rows))])} |")
    return "\n".join(lines)


def chain(world_size: int = 16) -> str:
    """The recipe as it is shipped, from the teacher's adaptor to the evaluation, in Markdown."""
    rows = [table_row(name, [], world_size) for name in CHAIN]
    hours = evaluation_hours(build(configure([str(CONFIGS / "pd.py")]))[0])
    totals = [sum(column) + hours for column in zip(*(each for _, each in rows))]
    return "\n".join([*table_heads(), *(f"| {cells} |" for cells, _ in rows),
                      f"| evaluation, {sum(n for n, _ in QUESTIONS.values()):,} questions | | | | | | {hours_cells([hours] * 4)} |",
                      f"| all | | | | | | {hours_cells(totals)} |"])


def table_heads() -> list[str]:
    links = " / ".join(f"{bandwidth / 1e9:.0f}" for bandwidth in BANDWIDTHS)
    return ["| stage | GB per GPU, longest rows (average) | fits | PFLOPs per step | GB sent per GPU and step | steps | "
            f"A100-hours, arithmetic | with links of {links} GB/s |", "|---|--:|---|--:|--:|--:|--:|--:|"]


def hours_cells(hours: list[float]) -> str:
    alone, *linked = (f"{each:.0f}" if each >= 1 else f"{each:.1f}" for each in hours)
    return f"{alone} | {' / '.join(linked)}"


def evaluation_hours(student: Llava, batch_size: int = 16, prompt: int = 90) -> float:
    """GPU-hours of evaluate.py: prompts of an image and `prompt` tokens, then token by token, each reading all weights."""
    seconds, weights = 0, 2 * count(student.decoder.parameters())
    for questions, new in QUESTIONS.values():
        tokens = student.config.image_tokens + prompt
        work = generation(student, new, Batch(batch_size, tokens, batch_size, batch_size, tokens)).total()
        seconds += math.ceil(questions / batch_size) * (work / (UTILIZATION * PEAK_FLOPS["bfloat16"]) + new * weights / BANDWIDTH)
    return seconds / 3600


def table_row(name: str, flags: list[str], world_size: int) -> tuple[str, list[float]]:
    """One config's cells, and its GPU-hours: of the arithmetic alone, and with each of BANDWIDTHS."""
    config = configure([str(CONFIGS / f"{name}.py"), *flags])
    student, teacher = build(config)
    step, steps = average_step(student, config), paper_steps(config)
    most, usual = (sum(memory(student, teacher, config, world_size, batch).values())
                   for batch in (longest_rows(config), micro_batch(config, round(step.tokens))))
    fits = " and ".join(card for card, room in CARDS.items() if most <= room) or "neither"
    passes = flops(student, teacher, config, step)
    total, seconds = sum(parts.total() for parts in passes.values()), gpu_seconds(passes, config)
    sent = communication(student, teacher, config, world_size)
    waits = [0.0, *(exposed_seconds(passes, sent, config, world_size, bandwidth) for bandwidth in BANDWIDTHS)]
    hours = [steps * (seconds + world_size * wait) / 3600 for wait in waits]
    cells = [name, f"{most / 1e9:.0f} ({usual / 1e9:.0f})", fits, f"{total / 1e15:.1f}", f"{sum(sent.values()) / 1e9:.1f}",
             f"{steps:,}", hours_cells(hours)]
    return " | ".join(cells), hours


def main(argv: list[str]) -> None:
    """Takes train.py's command line. WORLD_SIZE: the number of GPUs; torchrun sets it, and RANK, of which 0 reports."""
    if argv in ([], ["chain"]):
        print(chain() if argv else table())
        return
    config = configure(argv)
    if os.environ.get("RANK", "0") != "0":
        return
    lengths, steps = measure_rows(config)
    print(report(config, int(os.environ.get("WORLD_SIZE", 1)), lengths, steps), end="\n\n")
    for line in check_manifest(config.stage, config.data):
        print(line)


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
