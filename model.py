r"""
The multimodal model: a CLIP ViT, a two-layer adaptor, a Qwen decoder.

    image (3, S, S) --ViT--> P patch features --adaptor--> P vectors of width D \
                                                                                 > one sequence --decoder--> logits
    text ids ---------------embedding--------------------> one vector per token /

In `input_ids` an image is the <image> id repeated once per patch; the image's vectors replace the embeddings of those
positions. From there on the decoder treats image and text positions alike. This file holds the three parts, the whole
and the generation of text; engine/hf.py reads and writes its checkpoints as Hugging Face folders.

The dimension key, used by every file of the project:

    B batch            T decoder positions (image + text)   P patches per image
    D decoder width    Dv vision width                      H query heads, K kv heads, Dh head dim
    F FFN width        V vocabulary                         N images of a batch; in moe.py and losses.py: tokens
    E experts          A experts active per token           S image side in pixels

References: LLaVA-MoD arXiv 2408.15881, LLaVA-1.5 2310.03744, CLIP 2103.00020, Qwen1.5/Qwen2 2407.10671, Qwen3 2505.09388.
"""
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from configurator import UserError, require_memory
from moe import Routing, SparseFFN


# -----------------------------------------------------------------------------
# Sizes. The defaults are CLIP-L/14-336 and Qwen1.5-1.8B, the paper's 2B student.

@dataclass
class VisionConfig:
    image_size: int = 336
    patch_size: int = 14
    n_embd: int = 1024
    n_layer: int = 24
    n_head: int = 16
    n_ffn: int = 4096
    norm_eps: float = 1e-5
    feature_layer: int = -2    # -1 is the last block's output, -2 the one before it: the last block never runs

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass
class DecoderConfig:
    vocab_size: int = 151936   # rows of the embedding; the tokenizer uses the first 151,646, the rest is padding
    n_embd: int = 2048
    n_layer: int = 24
    n_head: int = 16
    n_kv_head: int = 16
    n_ffn: int = 5504
    head_dim: int = 0          # 0: n_embd / n_head, as in Qwen1.5 to 2.5
    qk_norm: bool = False      # Qwen3: each head's q and k are normalized, and q, k and v have no bias
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = False         # output head = embedding matrix
    max_positions: int = 32768
    num_experts: int = 0       # 0: dense
    top_k: int = 0
    norm_topk: bool = True
    sparse_layers: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.head_dim = self.head_dim or self.n_embd // self.n_head


@dataclass
class LlavaConfig:
    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    pad_token_id: int | None
    eos_token_id: int | list[int] | None   # the template's end of an answer
    template: str | None       # "vicuna" or "chatml", see data.py; None: the checkpoint does not say

    @property
    def image_tokens(self) -> int:
        """Positions that one image takes in the sequence."""
        return self.vision.patches


# -----------------------------------------------------------------------------
# Vision tower: CLIP's ViT. Pre-norm blocks with biases everywhere, full attention, QuickGELU.

class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_head = config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = rearrange(self.q_proj(x), "n p (h d) -> n h p d", h=self.n_head)
        k = rearrange(self.k_proj(x), "n p (h d) -> n h p d", h=self.n_head)
        v = rearrange(self.v_proj(x), "n p (h d) -> n h p d", h=self.n_head)
        y = F.scaled_dot_product_attention(q, k, v)                  # (N, H, P+1, Dh)
        return self.out_proj(rearrange(y, "n h p d -> n p (h d)"))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.n_embd, config.n_ffn)
        self.fc2 = nn.Linear(config.n_ffn, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))            # QuickGELU, CLIP's approximation of GELU


class VisionTower(nn.Module):
    """CLIP's image encoder up to the feature layer: (N, 3, S, S) -> (N, P, Dv), without the CLS position."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.n_embd, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.n_embd).normal_(std=config.n_embd ** -0.5))
        self.position_embedding = nn.Embedding(config.patches + 1, config.n_embd)
        self.pre_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.n_layer))
        self.post_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)              # part of CLIP, unused here

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))   # (N, Dv, S/14, S/14)
        x = rearrange(x, "n d h w -> n (h w) d")                                       # (N, P, Dv)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self.position_embedding.weight                # (N, P+1, Dv)
        x = self.pre_norm(x)
        # Numbered as in Hugging Face: hidden state 0 is this x, hidden state i the output of block i.
        last = self.config.n_layer + 1 + self.config.feature_layer
        for block in self.blocks[:last]:
            x = block(x)
        return x[:, 1:]                                                                # (N, P, Dv)


# -----------------------------------------------------------------------------
# Adaptor

class Adaptor(nn.Module):
    """LLaVA-1.5's `mlp2x_gelu`: (N, P, Dv) -> (N, P, D)."""

    def __init__(self, n_vision: int, n_embd: int):
        super().__init__()
        self.linear_1 = nn.Linear(n_vision, n_embd)
        self.linear_2 = nn.Linear(n_embd, n_embd)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


# -----------------------------------------------------------------------------
# Decoder: Qwen1.5/Qwen2. Pre-norm blocks, RMSNorm, rotary positions, grouped-query attention, SwiGLU.

class RMSNorm(nn.Module):
    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        # Under autocast, cast to the matmul dtype here, once; otherwise every matmul that reads y makes its own copy.
        device = x.device.type
        return y.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


def rope_angles(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles: (B, T) -> two of (B, 1, T, Dh), fp32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # (Dh/2,)
    angles = positions[:, None, :, None] * frequencies                                                # (B, 1, T, Dh/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """The two halves of the last dimension: (x1, x2) -> (-x2, x1)."""
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x_i, x_{i + Dh/2}) by its angle: (B, H, T, Dh) -> the same shape and dtype."""
    return (x * cos + rotate_half(x) * sin).to(x.dtype)


class KVCache:
    """Keys and values of every layer, so that tokens which the decoder has read need not be read again.

    Row b holds `row_lengths[b]` tokens, in its first slots. Batches are padded on the right, so each pass writes a row's
    new tokens behind its own last one, over the padding of the pass before, and `attn_mask` hides what is behind a token.
    """

    def __init__(self, config: DecoderConfig, rows: int, dtype: torch.dtype, device: torch.device):
        self.config = config
        self.k = torch.zeros(config.n_layer, rows, config.n_kv_head, 0, config.head_dim, dtype=dtype,
                             device=device)                          # (n_layer, B, K, slots, Dh)
        self.v = self.k.clone()
        self.row_lengths = torch.zeros(rows, dtype=torch.long, device=device)   # (B,) tokens of each row, without padding
        self.length = 0                   # slots in use: no row has more tokens
        self.is_first_pass = True         # nothing was in it before the tokens that are being read
        self.positions = None             # (B, T) positions, and slots, of the tokens that are being read
        self.attn_mask = None             # (B, 1, T, length) which slots each of them attends to

    def reserve(self, slots: int, reason: str) -> None:
        """Make room for so many tokens per row."""
        *shape, old, head_dim = self.k.shape
        if slots > old:
            new = (*shape, slots, head_dim)
            require_memory(2 * math.prod(new) * self.k.itemsize, f"{reason}: its KV cache", self.k.device)
            for name in ("k", "v"):
                wider = self.k.new_zeros(new)
                wider[..., :old, :] = getattr(self, name)
                setattr(self, name, wider)

    def start_pass(self, T: int, valid: torch.Tensor | None) -> torch.Tensor:
        """Place T more tokens in each row, those at the flat positions `valid` not padding -> their positions (B, T)."""
        self.is_first_pass = self.length == 0
        self.positions = self.row_lengths[:, None] + torch.arange(T, device=self.k.device)
        self.length += T
        if valid is None:
            self.row_lengths = self.row_lengths + T
        else:
            self.row_lengths = self.row_lengths.index_add(0, valid // T, torch.ones_like(valid))
        if not self.is_first_pass:
            slots = torch.arange(self.length, device=self.k.device)
            self.attn_mask = (slots <= self.positions[:, :, None])[:, None]
        return self.positions

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store those of the new tokens, (B, K, T, Dh) each -> all slots in use, (B, K, length, Dh) each."""
        if self.is_first_pass:                                       # positions are 0 .. T-1 in every row
            self.k[layer, :, :, :self.length] = k
            self.v[layer, :, :, :self.length] = v
        else:
            row = torch.arange(len(k), device=k.device)[:, None]     # (B, 1), indexes together with positions (B, T)
            self.k[layer, row, :, self.positions] = k.transpose(1, 2).to(self.k.dtype)           # (B, T, K, Dh)
            self.v[layer, row, :, self.positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, :self.length], self.v[layer, :, :, :self.length]

    def copy_rows(self, rows: torch.Tensor, more: int) -> "KVCache":
        """A cache whose row i is this one's row rows[i], with room for `more` tokens."""
        new = KVCache(self.config, len(rows), self.k.dtype, self.k.device)
        new.reserve(self.length + more, f"{len(rows)} rows of {self.length + more:,} tokens")
        new.row_lengths, new.length = self.row_lengths[rows], self.length
        for layer in range(len(self.k)):                             # one by one: no second copy of all layers
            new.k[layer, :, :, :self.length] = self.k[layer, rows, :, :self.length]
            new.v[layer, :, :, :self.length] = self.v[layer, rows, :, :self.length]
        return new

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length` of each row."""
        self.row_lengths, self.length = self.row_lengths.clamp(max=length), length


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.n_kv_head
        head_dim, bias = config.head_dim, not config.qk_norm
        self.q_proj = nn.Linear(config.n_embd, config.n_head * head_dim, bias=bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * head_dim, bias=bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * head_dim, bias=bias)
        self.o_proj = nn.Linear(config.n_head * head_dim, config.n_embd, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        q = self.q_norm(rearrange(self.q_proj(x), "b t (h d) -> b h t d", h=self.n_head))               # (B, H, T, Dh)
        k = self.k_norm(rearrange(self.k_proj(x), "b t (k d) -> b k t d", k=self.n_kv_head))            # (B, K, T, Dh)
        v = rearrange(self.v_proj(x), "b t (k d) -> b k t d", k=self.n_kv_head)                         # (B, K, T, Dh)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            all_k, all_v = cache.append(self.layer, k, v)            # (B, K, length, Dh)
            if not cache.is_first_pass:
                return self.o_proj(self.attend_to_cache(q, all_k, all_v, cache.attn_mask))
        # Padding is on the right, so causality alone hides it from every valid position. No mask tensor is needed, and
        # the fast attention kernels, which accept none, stay available.
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True,
                                           enable_gqa=self.n_head != self.n_kv_head)                    # (B, H, T, Dh)
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))

    def attend_to_cache(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        """T new tokens per row: (B, H, T, Dh), (B, K, length, Dh) twice, (B, 1, T, length) -> (B, T, H*Dh)."""
        # GQA: fold the query heads of a KV head into the sequence dimension, so K and V are read once.
        T, group = q.shape[2], self.n_head // self.n_kv_head
        q = rearrange(q, "b (k g) t d -> b k (g t) d", g=group)
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=attn_mask.repeat(1, 1, group, 1))
        return rearrange(y, "b k (g t) d -> b t (k g d)", t=T)


class FFN(nn.Module):
    """SwiGLU, (..., D) -> (..., D). A sparse layer's experts are copies of this."""

    def __init__(self, n_embd: int, n_ffn: int):
        super().__init__()
        self.gate_proj = nn.Linear(n_embd, n_ffn, bias=False)
        self.up_proj = nn.Linear(n_embd, n_ffn, bias=False)
        self.down_proj = nn.Linear(n_ffn, n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.n_embd, config.norm_eps)
        if layer in config.sparse_layers:
            experts = [FFN(config.n_embd, config.n_ffn) for _ in range(config.num_experts)]
            self.ffn = SparseFFN(experts, config.n_embd, config.top_k, config.norm_topk)
        else:
            self.ffn = FFN(config.n_embd, config.n_ffn)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, valid: torch.Tensor | None,
                cache: KVCache | None) -> tuple[torch.Tensor, Routing | None]:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        if isinstance(self.ffn, SparseFFN):
            y, routing = self.ffn(self.ffn_norm(x), valid)
        else:
            y, routing = self.ffn(self.ffn_norm(x)), None
        return x + y, routing


class Decoder(nn.Module):
    """The language model from embeddings to hidden states and logits; `Llava.embed` makes the embeddings."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.checkpointing = False    # True: the backward pass recomputes each block's activations
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None,
                cache: KVCache | None = None) -> tuple[torch.Tensor, list[Routing]]:
        """(B, T, D) -> normed hidden states (B, T, D), and the routing of each sparse layer in order.

        valid: flat positions of all but padding (None: of all), see `flat`; only the routers use it.
        """
        B, T, D = x.shape
        positions = torch.arange(T, device=x.device)[None] if cache is None else cache.start_pass(T, valid)   # (B or 1, T)
        cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        routings = []
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, cos, sin, valid, cache, use_reentrant=False)
            else:
                x, routing = block(x, cos, sin, valid, cache)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D)"""
        return self.embedding.weight if self.config.tied else self.lm_head.weight

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> logits (..., V). Apply it to the positions you need: V is by far the largest dimension here."""
        return F.linear(hidden, self.head_weight)


def sample_token(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """(B, V) -> (B,): greedy at temperature 0, otherwise by the inverse of the cumulative distribution.

    uniform: (B,) random numbers in [0, 1); None: from torch's generator.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if uniform is None:
        uniform = torch.rand(len(logits), device=logits.device)
    cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)                       # (B, V)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


# -----------------------------------------------------------------------------
# Positions of a batch. Selecting by a mask makes the CPU wait for a GPU, which has to count first; selecting by indices
# does not. So train.py finds the indices while the batch is still on the CPU.

def flat(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool -> (n,) the positions b * T + t where it is true, in reading order."""
    return mask.flatten().nonzero()[:, 0]


def valid_positions(input_ids: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    """(B, T) -> (B, T) bool: False at the padding on the right, after a row's last token that is not padding."""
    if pad_token_id is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)                  # (T,)
    length = (position * (input_ids != pad_token_id)).amax(1, keepdim=True)                      # (B, 1)
    return position <= length


def image_positions(input_ids: torch.Tensor, n_images: int, config: LlavaConfig) -> torch.Tensor:
    """(B, T) -> flat positions (N*P,). ValueError unless the rows have room for exactly so many images."""
    is_image, P = input_ids == config.image_token_id, config.image_tokens                        # (B, T)
    per_row = is_image.sum(1)                                        # (B,)
    if int(per_row.sum()) != n_images * P or bool((per_row % P).any()):
        room = ", ".join(f"{count / P:g}" for count in per_row.tolist())
        raise ValueError(f"the batch has {n_images} images of {P} positions each, but its rows have room for "
                         f"{room} of them")
    return flat(is_image)


# -----------------------------------------------------------------------------
# Llava: the three parts as one model

class Llava(nn.Module):
    """`Llava.from_pretrained(folder)`, `Llava.from_parts(clip_folder, qwen_folder)`, or `Llava(config, tokenizer)`."""

    def __init__(self, config: LlavaConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.vision = VisionTower(config.vision)
        self.adaptor = Adaptor(config.vision.n_embd, config.decoder.n_embd)
        self.decoder = Decoder(config.decoder)

    @torch.no_grad()    # the ViT is frozen in every stage
    def encode_images(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """(N, 3, S, S) -> (N, P, Dv); None (no image in the batch) -> (0, P, Dv)."""
        weight = self.vision.patch_embedding.weight
        if pixel_values is None:
            return weight.new_zeros(0, self.config.image_tokens, self.config.vision.n_embd)
        return self.vision(pixel_values.to(weight.device))

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """Text embeddings with the image vectors at the image positions: (B, T), (N, P, Dv) -> (B, T, D)."""
        if image is None:
            image = image_positions(input_ids, len(features), self.config)
        x = self.decoder.embedding(input_ids)                        # (B, T, D)
        # In a batch without images the adaptor runs on an empty tensor. Its gradients are then zero instead of missing,
        # which DistributedDataParallel needs. (The released code runs a black image through the ViT for that.)
        vectors = self.adaptor(features).flatten(0, 1)               # (N*P, D), images in reading order
        return x.flatten(0, 1).index_copy(0, image, vectors.to(x.dtype)).view_as(x)

    def hidden_states(self, input_ids: torch.Tensor, features: torch.Tensor, valid: torch.Tensor | None = None,
                      image: torch.Tensor | None = None) -> tuple[torch.Tensor, list[Routing]]:
        """(B, T), (N, P, Dv) -> the decoder's last hidden states (B, T, D) and the routings.

        The training objectives start here: they select the response positions first and apply the head to those only.
        valid, image: flat positions (see `flat`) of all but padding, and of images; None: found here.
        """
        if valid is None:
            valid = flat(valid_positions(input_ids, self.config.pad_token_id))
        return self.decoder(self.embed(input_ids, features, image), valid)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) padded on the right, (N, 3, S, S) the images in reading order -> logits (B, T, V).

        Rows may hold several images or none. The logits at position t predict token t+1. Raises ValueError if the
        image positions of `input_ids` do not match the number of images.
        """
        hidden, _ = self.hidden_states(input_ids, self.encode_images(pixel_values))
        return self.decoder.head(hidden)

    def make_cache(self, rows: int) -> KVCache:
        weight = self.decoder.blocks[0].attn.k_proj.weight
        return KVCache(self.config.decoder, rows, weight.dtype, weight.device)

    @torch.no_grad()
    def read(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """Put the tokens (B, T) behind those in the cache -> the hidden state of each row's last token (B, D)."""
        valid = valid_positions(input_ids, self.config.pad_token_id)   # (B, T)
        cache.reserve(cache.length + input_ids.shape[1], f"a prompt of {input_ids.shape[1]:,} tokens")
        hidden, _ = self.decoder(self.embed(input_ids, self.encode_images(pixel_values)), flat(valid), cache)
        last = (valid.sum(1) - 1).clamp(min=0)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    @torch.no_grad()
    def stream(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, max_new_tokens: int = 128,
               temperature: float = 0.0, eos_token_id: int | list[int] | None = None,
               uniforms: torch.Tensor | None = None, banned: list[int] | None = None,
               cache: KVCache | None = None) -> Iterator[torch.Tensor]:
        """Yield one new token per row, (B,), as soon as it is known, until every row has ended.

        Greedy at temperature 0, otherwise sampled from softmax(logits / temperature) with `uniforms` (B, max_new_tokens)
        or torch's generator. `banned` ids are never chosen. Rows are padded on the right, each continues after its own
        last token, and after its end token yields padding. `cache` holds what comes before `input_ids` and its images.
        """
        eos_token_id = self.config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        filler = self.config.pad_token_id
        if filler is None and ends:
            filler = ends[0]
        ends = torch.tensor(ends, dtype=torch.long, device=input_ids.device)
        banned = torch.tensor(banned or [], dtype=torch.long, device=input_ids.device)

        cache = self.make_cache(len(input_ids)) if cache is None else cache
        cache.reserve(cache.length + input_ids.shape[1] + max_new_tokens, f"max_new_tokens={max_new_tokens:,}")
        hidden = self.read(input_ids, pixel_values, cache)           # (B, D) the prompt, all rows at once

        # The answer, token by token
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for i in range(max_new_tokens):
            logits = self.decoder.head(hidden).float()                                        # (B, V)
            if i == 0 and not bool(logits.isfinite().all()):         # else noise, like any other answer
                raise UserError(f"the model's logits are NaN or infinite in {hidden.dtype}: use a dtype of a larger range, "
                                "or the checkpoint of a run that did not diverge")
            if len(banned):
                logits[:, banned] = -torch.inf
            token = sample_token(logits, temperature, None if uniforms is None else uniforms[:, i])      # (B,)
            if filler is not None:
                token = torch.where(finished, filler, token)
            yield token
            finished = finished | torch.isin(token, ends)
            if i == max_new_tokens - 1 or bool(finished.all()):
                return
            hidden, _ = self.decoder(self.decoder.embedding(token[:, None]), None, cache)
            hidden = hidden[:, 0]

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, max_new_tokens: int = 128,
                 temperature: float = 0.0, eos_token_id: int | list[int] | None = None,
                 uniforms: torch.Tensor | None = None, banned: list[int] | None = None,
                 cache: KVCache | None = None) -> torch.Tensor:
        """The new tokens only, (B, new), the end token included, padding after it. See `stream`."""
        tokens = self.stream(input_ids, pixel_values, max_new_tokens, temperature, eos_token_id, uniforms, banned, cache)
        return torch.stack(list(tokens), dim=1)

    def unanswerable_ids(self) -> list[int]:
        """Ids that an answer must not contain: <image>, padding, and embedding rows that the tokenizer does not know."""
        ends = self.config.eos_token_id if isinstance(self.config.eos_token_id, list) else [self.config.eos_token_id]
        special = [i for i in (self.config.image_token_id, self.config.pad_token_id) if i is not None and i not in ends]
        return special + list(range(self.tokenizer.get_vocab_size(), self.config.decoder.vocab_size))

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each part, in total and, for the decoder, active per token (A of E experts)."""
        counts = {"vision": parameter_count(self.vision), "adaptor": parameter_count(self.adaptor),
                  "decoder": parameter_count(self.decoder)}
        idle = 0
        for i in self.config.decoder.sparse_layers:
            ffn = self.decoder.blocks[i].ffn
            idle += parameter_count(ffn.experts[0]) * (len(ffn.experts) - ffn.top_k)
        return counts | {"decoder_active": counts["decoder"] - idle}

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu") -> "Llava":
        """Open a LLaVA folder, ours or one of transformers'. Raises UserError."""
        from engine.hf import load_llava
        return load_llava(Path(os.path.expanduser(path)), dtype, device)

    @classmethod
    def from_parts(cls, vision_path: str | Path, llm_path: str | Path, seed: int = 0,
                   template: str = "vicuna", device: str | torch.device = "cpu") -> "Llava":
        """A CLIP folder + a Qwen folder + a fresh adaptor drawn from `seed`. Raises UserError."""
        from engine.hf import assemble_llava
        return assemble_llava(Path(os.path.expanduser(vision_path)), Path(os.path.expanduser(llm_path)), seed, template, device)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None,
                        weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write a folder that `from_pretrained` and stock transformers open; `dtype` None keeps each tensor's own.

        `weights`: the full parameters by name, if this model holds only shards of them (engine/distributed.py).
        """
        from engine.hf import save_llava
        save_llava(self, Path(os.path.expanduser(path)), dtype, weights)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
