"""
The multimodal model: a CLIP ViT looks, a two-layer adaptor translates, a Qwen decoder speaks.

    image (3, S, S) --ViT--> P patch features --adaptor--> P vectors of decoder width
    text            --embedding------------------------>  one vector per token          } one sequence --decoder--> logits

In `input_ids` an image is the <image> id repeated once per patch; the image's vectors take those places. From there on
the decoder does not know which positions were pixels. This file holds the three parts, the generation of text, and at
its end the Hugging Face folders in and out: what we save opens in stock transformers, and the other way round.

The dimension key, used by every file of the project:

    B batch            T decoder positions (image + text)   P patches per image
    D decoder width    Dv vision width                      H query heads, K kv heads, Dh head dim
    F FFN width        V vocabulary                         N tokens as the router and the losses see them
    E experts          A experts active per token           S image side in pixels

References: LLaVA-MoD arXiv 2408.15881, LLaVA-1.5 2310.03744, CLIP 2103.00020, Qwen1.5/Qwen2 2407.10671.
"""
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe import Routing, SparseFFN


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message is one line that says which file or key, and why."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))             # whatever the names found in a file hold


# -----------------------------------------------------------------------------
# Sizes. The defaults are CLIP-L/14-336 and Qwen1.5-1.8B, the paper's 2B student.

@dataclass
class VisionConfig:
    image_size: int = 336
    patch_size: int = 14
    n_embd: int = 1024
    n_layer: int = 24
    n_head: int = 16
    ffn: int = 4096
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
    ffn: int = 5504
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = False         # output head = embedding matrix
    max_positions: int = 32768
    num_experts: int = 0       # 0: dense
    top_k: int = 0
    norm_topk: bool = True
    sparse_layers: list[int] = field(default_factory=list)


@dataclass
class LlavaConfig:
    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    pad_token_id: int | None
    eos_token_id: int | list[int] | None   # the template's end of an answer
    template: str | None       # "vicuna" or "chatml", which data.py renders; None: the checkpoint does not say

    @property
    def image_tokens(self) -> int:
        """Positions that one image takes in the sequence."""
        return self.vision.patches


# The base models of the paper (read off their published config.json), by their names on the Hub, matched exactly.
DECODERS = {
    "Qwen/Qwen1.5-0.5B": DecoderConfig(n_embd=1024, n_layer=24, n_head=16, n_kv_head=16, ffn=2816, tied=True),
    "Qwen/Qwen1.5-1.8B": DecoderConfig(n_embd=2048, n_layer=24, n_head=16, n_kv_head=16, ffn=5504),
    "Qwen/Qwen1.5-4B": DecoderConfig(n_embd=2560, n_layer=40, n_head=20, n_kv_head=20, ffn=6912, rope_theta=5e6),
    "Qwen/Qwen1.5-7B": DecoderConfig(n_embd=4096, n_layer=32, n_head=32, n_kv_head=32, ffn=11008),
    "Qwen/Qwen2-0.5B": DecoderConfig(n_embd=896, n_layer=24, n_head=14, n_kv_head=2, ffn=4864, tied=True,
                                     max_positions=131072),
    "Qwen/Qwen2-1.5B": DecoderConfig(n_embd=1536, n_layer=28, n_head=12, n_kv_head=2, ffn=8960, tied=True,
                                     max_positions=131072),
    "Qwen/Qwen2-7B": DecoderConfig(vocab_size=152064, n_embd=3584, n_layer=28, n_head=28, n_kv_head=4, ffn=18944,
                                   max_positions=131072),
}


# -----------------------------------------------------------------------------
# The eye: CLIP's ViT. Pre-norm blocks with biases everywhere, full attention, QuickGELU.

class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_head = config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = "n p (h d) -> n h p d"
        q, k, v = (rearrange(proj(x), split, h=self.n_head) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)                  # (N, H, P+1, Dh)
        return self.out_proj(rearrange(y, "n h p d -> n p (h d)"))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.n_embd, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))            # QuickGELU, CLIP's stand-in for GELU


class VisionTower(nn.Module):
    """CLIP's image encoder up to the feature layer: (N, 3, S, S) -> (N, P, Dv), the CLS position dropped."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.n_embd, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(config.n_embd) * config.n_embd ** -0.5)
        self.position_embedding = nn.Embedding(config.patches + 1, config.n_embd)
        self.pre_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.n_layer))
        self.post_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)   # CLIP's, after the last block: stored, unused

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))   # (N, Dv, S/14, S/14)
        x = rearrange(x, "n d h w -> n (h w) d")                                       # (N, P, Dv)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self.position_embedding.weight                # (N, P+1, Dv)
        x = self.pre_norm(x)
        # Counting as Hugging Face does: hidden state 0 is this x, hidden state i the output of block i.
        last = self.config.n_layer + 1 + self.config.feature_layer
        for block in self.blocks[:last]:
            x = block(x)
        return x[:, 1:]                                                                # (N, P, Dv)


# -----------------------------------------------------------------------------
# The translator

class Adaptor(nn.Module):
    """LLaVA-1.5's `mlp2x_gelu`: (N, P, Dv) -> (N, P, D)."""

    def __init__(self, n_vision: int, n_embd: int):
        super().__init__()
        self.linear_1 = nn.Linear(n_vision, n_embd)
        self.linear_2 = nn.Linear(n_embd, n_embd)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


# -----------------------------------------------------------------------------
# The speaker: Qwen1.5/Qwen2. Pre-norm blocks, RMSNorm, rotary positions, grouped-query attention, SwiGLU.

class RMSNorm(nn.Module):
    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        # Under autocast in what the matrix products want: one cast here instead of one, and one copy, for each of them.
        device = x.device.type
        return y.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


def rotary(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles: (B, T) -> two of (B, 1, T, Dh), fp32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)   # (Dh/2,)
    angles = positions[:, None, :, None] * frequencies                                                   # (B, 1, T, Dh/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i + Dh/2}) by its angle: (B, H, T, Dh) -> the same shape and dtype."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class KVCache:
    """Keys and values of the positions seen so far, in memory taken once; every row has its own length."""

    def __init__(self, config: DecoderConfig, lengths: torch.Tensor, n_prompt: int, n_new: int, dtype: torch.dtype):
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, len(lengths), config.n_kv_head, n_prompt + n_new, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=lengths.device)   # (n_layer, B, K, places, Dh)
        self.v = torch.zeros(shape, dtype=dtype, device=lengths.device)
        self.lengths = lengths          # (B,) real positions of each row's prompt, then of prompt and answer
        self.used = n_prompt            # no row is longer than this; what lies beyond is not looked at
        self.positions = None           # (B, 1) where each row's new token stands; None while reading the prompt
        self.visible = None             # (B, 1, 1, used) which keys that token may see

    def start_token(self) -> None:
        """Make room for one more token in every row."""
        self.used += 1
        self.positions = self.lengths[:, None]
        places = torch.arange(self.used, device=self.lengths.device)
        self.visible = (places <= self.positions)[:, None, None, :]
        self.lengths = self.lengths + 1


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.n_kv_head
        head_dim = config.n_embd // config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_head * head_dim)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * head_dim)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * head_dim)
        self.o_proj = nn.Linear(config.n_head * head_dim, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        q = rotate(rearrange(self.q_proj(x), "b t (h d) -> b h t d", h=self.n_head), cos, sin)      # (B, H, T, Dh)
        k = rotate(rearrange(self.k_proj(x), "b t (k d) -> b k t d", k=self.n_kv_head), cos, sin)   # (B, K, T, Dh)
        v = rearrange(self.v_proj(x), "b t (k d) -> b k t d", k=self.n_kv_head)                     # (B, K, T, Dh)
        if cache is not None and cache.positions is not None:
            return self.o_proj(self.attend_to_cache(q, k, v, cache))
        if cache is not None:                                        # the prompt: keep its keys and values
            cache.k[self.layer, :, :, :x.shape[1]], cache.v[self.layer, :, :, :x.shape[1]] = k, v
        # Padding is on the right, so causality alone hides it from every real position: no mask tensor is needed, and
        # the fast attention kernels, which know no mask, stay available.
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True,
                                           enable_gqa=self.n_head != self.n_kv_head)                # (B, H, T, Dh)
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))

    def attend_to_cache(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """One new token per row: (B, H, 1, Dh), (B, K, 1, Dh) twice -> (B, 1, H*Dh)."""
        row, place = torch.arange(len(q), device=q.device), cache.positions[:, 0]
        cache.k[self.layer, row, :, place] = k[:, :, 0].to(cache.k.dtype)        # at each row's own place
        cache.v[self.layer, row, :, place] = v[:, :, 0].to(cache.v.dtype)
        k, v = (kept[self.layer, :, :, :cache.used].to(q.dtype) for kept in (cache.k, cache.v))      # (B, K, used, Dh)
        # The H/K heads that share keys ask together, like so many positions of one head: the keys are read once.
        q = rearrange(q, "b (k g) 1 d -> b k g d", k=self.n_kv_head)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.visible)     # (B, K, H/K, Dh)
        return rearrange(y, "b k g d -> b 1 (k g d)")


class FFN(nn.Module):
    """SwiGLU, (..., D) -> (..., D). A sparse layer's experts are copies of this."""

    def __init__(self, n_embd: int, ffn: int):
        super().__init__()
        self.gate_proj = nn.Linear(n_embd, ffn, bias=False)
        self.up_proj = nn.Linear(n_embd, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.n_embd, config.norm_eps)
        if layer in config.sparse_layers:
            experts = [FFN(config.n_embd, config.ffn) for _ in range(config.num_experts)]
            self.ffn = SparseFFN(experts, config.n_embd, config.top_k, config.norm_topk)
        else:
            self.ffn = FFN(config.n_embd, config.ffn)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, real: torch.Tensor | None,
                cache: KVCache | None) -> tuple[torch.Tensor, Routing | None]:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        if isinstance(self.ffn, SparseFFN):
            y, routing = self.ffn(self.ffn_norm(x), real)
        else:
            y, routing = self.ffn(self.ffn_norm(x)), None
        return x + y, routing


class Decoder(nn.Module):
    """The language model without its input side: embeddings are looked up by `Llava.embed`, which adds the images."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.checkpointing = False    # True: the backward pass computes each block again instead of storing its insides
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, x: torch.Tensor, real: torch.Tensor | None = None,
                cache: KVCache | None = None) -> tuple[torch.Tensor, list[Routing]]:
        """(B, T, D) -> normed hidden states (B, T, D), and the routing of each sparse layer in order.

        `real` (B, T) is false at padding; it matters to the routers only.
        """
        B, T, D = x.shape
        if cache is not None and cache.positions is not None:        # one new token per row
            positions = cache.positions                              # (B, 1)
        else:
            positions = torch.arange(T, device=x.device)[None]       # (1, T)
        cos, sin = rotary(positions, D // self.config.n_head, self.config.rope_theta)
        routings = []
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, cos, sin, real, cache, use_reentrant=False)
            else:
                x, routing = block(x, cos, sin, real, cache)
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


# -----------------------------------------------------------------------------
# The whole

class Llava(nn.Module):
    """`Llava.from_pretrained(folder)`, `Llava.from_parts(clip_folder, qwen_folder)`, or `Llava(config, tokenizer)`."""

    def __init__(self, config: LlavaConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.vision = VisionTower(config.vision)
        self.adaptor = Adaptor(config.vision.n_embd, config.text.n_embd)
        self.decoder = Decoder(config.text)

    @torch.no_grad()    # the ViT is frozen in every stage
    def encode_images(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """(N, 3, S, S) -> (N, P, Dv); None (no image in the batch) -> (0, P, Dv)."""
        weight = self.vision.patch_embedding.weight
        if pixel_values is None:
            return weight.new_zeros(0, self.config.image_tokens, self.config.vision.n_embd)
        return self.vision(pixel_values.to(weight.device))

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Text embeddings with the images in their places: (B, T), (N, P, Dv) -> (B, T, D)."""
        is_image = input_ids == self.config.image_token_id           # (B, T)
        self.check_image_positions(is_image, len(features))
        x = self.decoder.embedding(input_ids)                        # (B, T, D)
        # Without an image the adaptor runs on zero of them: its gradient is then zero rather than missing, which
        # DistributedDataParallel needs. (The released code pushes a black image through the ViT for that.)
        vectors = self.adaptor(features)                             # (N, P, D)
        return x.masked_scatter(is_image[:, :, None], vectors.to(x.dtype))   # images in reading order

    def check_image_positions(self, is_image: torch.Tensor, n_images: int) -> None:
        per_row = is_image.sum(1)
        P = self.config.image_tokens
        if int(per_row.sum()) != n_images * P or bool((per_row % P).any()):
            counts = [count / P for count in per_row.tolist()]
            raise ValueError(f"the batch has {n_images} images of {P} positions each, but its rows have room for "
                             f"{', '.join(f'{c:g}' for c in counts)} of them")

    def real_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T) bool: false at the padding, which stands on the right."""
        if self.config.pad_token_id is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)              # (T,)
        length = (position * (input_ids != self.config.pad_token_id)).amax(1, keepdim=True)      # (B, 1)
        return position <= length

    def hidden_states(self, input_ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, list[Routing]]:
        """(B, T), (N, P, Dv) -> the decoder's last hidden states (B, T, D) and the routings.

        The training objectives start here: they pick the response positions first and apply the head to those only.
        """
        return self.decoder(self.embed(input_ids, features), self.real_positions(input_ids))

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) padded on the right, (N, 3, S, S) the images in reading order -> logits (B, T, V).

        Rows may hold several images or none. The logits at position t predict token t+1. Raises ValueError when the
        image positions of `input_ids` and the number of images do not agree.
        """
        hidden, _ = self.hidden_states(input_ids, self.encode_images(pixel_values))
        return self.decoder.head(hidden)

    @torch.no_grad()
    def stream(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, max_new_tokens: int = 128,
               temperature: float = 0.0, eos_token_id: int | list[int] | None = None) -> Iterator[torch.Tensor]:
        """Yield one new token per row, (B,), as soon as it is known, until every row has ended.

        Greedy at temperature 0, else sampled from softmax(logits / temperature) with torch's generator. Rows of unequal
        length are padded on the right; each continues from its own last token. After its end token a row yields padding.
        """
        eos_token_id = self.config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        after_end = self.config.pad_token_id if self.config.pad_token_id is not None or not ends else ends[0]
        ends = torch.tensor(ends, dtype=torch.long, device=input_ids.device)

        real = self.real_positions(input_ids)                        # (B, T)
        lengths = real.sum(1)                                        # (B,)
        x = self.embed(input_ids, self.encode_images(pixel_values))
        dtype = self.decoder.blocks[0].attn.k_proj.weight.dtype
        cache = KVCache(self.config.text, lengths, input_ids.shape[1], max_new_tokens, dtype)
        hidden, _ = self.decoder(x, real, cache)
        hidden = hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1]       # (B, D)
        finished = torch.zeros_like(lengths, dtype=torch.bool)
        for i in range(max_new_tokens):
            logits = self.decoder.head(hidden).float()                                        # (B, V)
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
            else:
                token = logits.argmax(-1)                                                     # (B,)
            if after_end is not None:
                token = torch.where(finished, after_end, token)
            yield token
            finished = finished | torch.isin(token, ends)
            if i == max_new_tokens - 1 or bool(finished.all()):
                return
            cache.start_token()
            hidden, _ = self.decoder(self.decoder.embedding(token[:, None]), None, cache)
            hidden = hidden[:, 0]

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, max_new_tokens: int = 128,
                 temperature: float = 0.0, eos_token_id: int | list[int] | None = None) -> torch.Tensor:
        """The new tokens only, (B, new), the end token included, padding after it. See `stream`."""
        return torch.stack(list(self.stream(input_ids, pixel_values, max_new_tokens, temperature, eos_token_id)), dim=1)

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each part, in total and, for the decoder, active per token (A of E experts)."""
        count = lambda module: sum(p.numel() for p in module.parameters())
        idle = 0
        for i in self.config.text.sparse_layers:
            ffn = self.decoder.blocks[i].ffn
            idle += count(ffn.experts[0]) * (len(ffn.experts) - ffn.top_k)
        decoder = count(self.decoder)
        return {"vision": count(self.vision), "adaptor": count(self.adaptor), "decoder": decoder,
                "decoder_active": decoder - idle}

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu") -> "Llava":
        """Open a LLaVA folder, ours or one of transformers'. Raises CheckpointError."""
        return load_llava(Path(path), dtype, device)

    @classmethod
    def from_parts(cls, vision_path: str | Path, llm_path: str | Path, seed: int = 0,
                   template: str = "vicuna") -> "Llava":
        """A CLIP folder + a Qwen1.5/Qwen2 folder + a fresh adaptor drawn from `seed`. Raises CheckpointError."""
        return assemble_llava(Path(vision_path), Path(llm_path), seed, template)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None,
                        weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write a folder that `from_pretrained` and stock transformers open; `dtype` None keeps each tensor's own.

        `weights`: the parameters by name, where the model itself does not hold them whole (parallel.py).
        """
        save_llava(self, Path(path), dtype, weights)


# =============================================================================
# Hugging Face folders. From here on nothing computes: names, configs, files.
#
# Names. Left, our parameter (numbers are {}); right, the published key inside its tower.

VISION_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",                                      # sic, in every CLIP checkpoint
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.attn.q_proj": "encoder.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k_proj": "encoder.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v_proj": "encoder.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.out_proj": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.fc1": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.fc2": "encoder.layers.{}.mlp.fc2",
    "post_norm": "post_layernorm",
}
ADAPTOR_KEYS = {"linear_1": "linear_1", "linear_2": "linear_2"}
DECODER_KEYS = {
    "embedding": "model.embed_tokens",
    "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.o_proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.gate_proj": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.ffn.up_proj": "model.layers.{}.mlp.up_proj",
    "blocks.{}.ffn.down_proj": "model.layers.{}.mlp.down_proj",
    "blocks.{}.ffn.router": "model.layers.{}.mlp.gate",
    "blocks.{}.ffn.experts.{}.gate_proj": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blocks.{}.ffn.experts.{}.up_proj": "model.layers.{}.mlp.experts.{}.up_proj",
    "blocks.{}.ffn.experts.{}.down_proj": "model.layers.{}.mlp.experts.{}.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
TOWERS = {   # our module -> (its prefix in a LLaVA folder, its table)
    "vision": ("vision_tower.vision_model.", VISION_KEYS),
    "adaptor": ("multi_modal_projector.", ADAPTOR_KEYS),
    "decoder": ("language_model.", DECODER_KEYS),
}

# Published keys that we do not hold, on purpose: buffers of old releases, and the text half of a full CLIP checkpoint.
IGNORED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)|logit_scale"
                     r"|(text_model|text_projection|visual_projection)\..*")
# qwen2_moe has a shared expert, which we do not: width 0 and a gate that multiplies nothing, written so that transformers
# finds every tensor it expects.
SHARED_EXPERT = re.compile(r".*\.mlp\.(shared_expert\.(gate|up|down)_proj|shared_expert_gate)\.weight")


def published_key(tower: str, name: str) -> str:
    """Our parameter name inside a tower ("blocks.3.attn.q_proj.weight") -> its key in a LLaVA folder."""
    prefix, table = TOWERS[tower]
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    module, dot, kind = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name).rpartition(".")
    if name in table:                                                # a bare parameter, without .weight or .bias
        return prefix + table[name]
    return prefix + table[module].format(*numbers) + dot + kind


def canonical_key(key: str) -> str:
    """Any layout of a LLaVA folder's key -> the published one.

    transformers has moved the towers around (`model.language_model.layers`, `vision_tower.encoder`, a top-level lm_head).
    """
    key = key.removeprefix("model.") if key.startswith(("model.vision_tower.", "model.multi_modal_projector.",
                                                        "model.language_model.")) else key
    if key == "lm_head.weight":
        return "language_model.lm_head.weight"
    if key.startswith("vision_tower.") and not key.startswith("vision_tower.vision_model."):
        return key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if key.startswith("language_model.") and not key.startswith(("language_model.model.", "language_model.lm_head.")):
        return key.replace("language_model.", "language_model.model.", 1)
    return key


# -----------------------------------------------------------------------------
# Reading

def read_json(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is {path.parent} a Hugging Face checkpoint folder?")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def expect(path: Path, config: dict, key: str, only: object, default: object = None) -> None:
    """The architecture is fixed here; a checkpoint that asks for another one must not load quietly."""
    found = config.get(key, only if default is None else default)
    if found != only:
        raise CheckpointError(f"{path}: {key} is {shorten(found)}, but this code computes {only!r} only")


def take(path: Path, config: dict, key: str, kind: type, default: object = None, least: int = 1,
         most: int = 10**8) -> object:
    """A number or a bool from a config, checked."""
    value = config.get(key)
    value = default if value is None else value
    if kind is bool:
        good, expected = isinstance(value, bool), "true or false"
    else:
        good = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        good, expected = good and least <= value <= most, f"a number from {least} to {most:,}"
    if not good:
        raise CheckpointError(f"{path}: {key} is {shorten(value)}, expected {expected}")
    return kind(value)


def take_object(path: Path, config: dict, key: str) -> dict:
    """A part of a config that may be absent."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} is {shorten(value)}, expected an object")
    return value or {}


def shorten(value: object) -> str:
    """A found value, short enough for a one-line message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_vision_config(path: Path, config: dict) -> VisionConfig:
    expect(path, config, "hidden_act", "quick_gelu")
    expect(path, config, "num_channels", 3)
    default = VisionConfig()
    vision = VisionConfig(
        # the defaults here are Hugging Face's own, for files that omit a key
        image_size=take(path, config, "image_size", int, 224),
        patch_size=take(path, config, "patch_size", int, 32),
        n_embd=take(path, config, "hidden_size", int, 768),
        n_layer=take(path, config, "num_hidden_layers", int, 12, most=1000),
        n_head=take(path, config, "num_attention_heads", int, 12),
        ffn=take(path, config, "intermediate_size", int, 3072),
        norm_eps=take(path, config, "layer_norm_eps", float, default.norm_eps, least=0),
    )
    if vision.image_size % vision.patch_size:
        raise CheckpointError(f"{path}: image_size {vision.image_size} is not a multiple of patch_size "
                              f"{vision.patch_size}")
    if vision.n_embd % vision.n_head:
        raise CheckpointError(f"{path}: hidden_size {vision.n_embd} is not a multiple of num_attention_heads "
                              f"{vision.n_head}")
    return vision


def read_decoder_config(path: Path, config: dict) -> DecoderConfig:
    kind = config.get("model_type")
    if kind not in ("qwen2", "qwen2_moe"):
        raise CheckpointError(f"{path}: the language model is of type {kind!r}; this code reads qwen2 and qwen2_moe")
    expect(path, config, "hidden_act", "silu")
    expect(path, config, "use_sliding_window", False)
    expect(path, config, "qkv_bias", True)
    rope = take_object(path, config, "rope_parameters") or take_object(path, config, "rope_scaling")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise CheckpointError(f"{path}: rope_type is {rope_type!r}, but this code computes 'default' only")
    n_head = take(path, config, "num_attention_heads", int)
    text = DecoderConfig(
        vocab_size=take(path, config, "vocab_size", int),
        n_embd=take(path, config, "hidden_size", int),
        n_layer=take(path, config, "num_hidden_layers", int, most=1000),
        n_head=n_head,
        n_kv_head=take(path, config, "num_key_value_heads", int, n_head),
        ffn=take(path, config, "intermediate_size", int),
        rope_theta=take(path, {**config, **rope}, "rope_theta", float, 10000.0),
        norm_eps=take(path, config, "rms_norm_eps", float, 1e-6, least=0),
        tied=take(path, config, "tie_word_embeddings", bool, False),
        max_positions=take(path, config, "max_position_embeddings", int, 32768),
    )
    if text.n_embd % text.n_head or text.n_head % text.n_kv_head:
        raise CheckpointError(f"{path}: hidden_size {text.n_embd}, {text.n_head} heads and {text.n_kv_head} kv heads do not "
                              "divide one another")
    if kind == "qwen2_moe":
        expect(path, config, "shared_expert_intermediate_size", 0, default=5632)
        expect(path, config, "moe_intermediate_size", text.ffn, default=1408)
        text.num_experts = take(path, config, "num_experts", int, 60, most=1000)
        text.top_k = take(path, config, "num_experts_per_tok", int, 4)
        text.norm_topk = take(path, config, "norm_topk_prob", bool, False)
        step, dense = take(path, config, "decoder_sparse_step", int, 1, least=0), config.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise CheckpointError(f"{path}: mlp_only_layers is {shorten(dense)}, expected a list of layer numbers")
        text.sparse_layers = [i for i in range(text.n_layer) if step and (i + 1) % step == 0 and i not in dense]
        if not 1 <= text.top_k <= text.num_experts:
            raise CheckpointError(f"{path}: num_experts_per_tok {text.top_k} must lie between 1 and num_experts "
                                  f"{text.num_experts}")
    return text


def weight_files(folder: Path) -> dict[str, Path]:
    """Every tensor of a folder -> the file that holds it. A single file or shards with an index; .safetensors or .bin."""
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index_name).is_file():
            index = read_json(folder / index_name).get("weight_map")
            if not isinstance(index, dict):
                raise CheckpointError(f"{folder / index_name}: has no weight_map")
            for key, name in index.items():
                if not isinstance(name, str) or not name or Path(name).name != name:
                    raise CheckpointError(f"{folder / index_name}: {key} is in {shorten(name)}, expected a file beside the index")
            return {key: folder / name for key, name in index.items()}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return {key: folder / name for key in TensorFile(folder / name).keys()}
    raise CheckpointError(f"{folder}: no weights here; expected model.safetensors, model.safetensors.index.json or "
                          "pytorch_model.bin")


class TensorFile:
    """One weight file, opened lazily where its format allows."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, though the index of its folder names it")
        try:
            if path.suffix == ".safetensors":
                self.file = safe_open(path, framework="pt")
            else:   # openai/clip-vit-large-patch14-336 has only this; weights_only refuses pickled code
                self.file = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
            raise self.damaged(error) from None
        except Exception as error:   # pickle raises its own
            if "pickle" not in type(error).__name__.lower():
                raise
            raise self.damaged(error) from None

    def damaged(self, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:200]
        return CheckpointError(f"{self.path}: cannot be read ({reason}); fetch or write it again")

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def get(self, key: str) -> torch.Tensor:
        if key not in self.keys():
            raise CheckpointError(f"{self.path}: has no tensor {key}, though the index of its folder says so")
        return self.file.get_tensor(key) if self.path.suffix == ".safetensors" else self.file[key]


def read_tensors(folder: Path, wanted: dict[str, torch.Size],
                 rename=canonical_key) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, tensor) for every key of `wanted`, having checked that the folder holds exactly those, in those shapes.

    Every tensor is accounted for: an unknown key, a missing one or a wrong shape is a CheckpointError.
    """
    where = {}                                                       # wanted key -> (file, key in the file)
    for key, path in weight_files(folder).items():
        name = rename(key)
        if name in wanted:
            where[name] = (path, key)
        elif not IGNORED.fullmatch(key) and not SHARED_EXPERT.fullmatch(name):
            # a tied head is sometimes stored all the same; it is the embedding once more
            if not (name == "language_model.lm_head.weight" and "language_model.model.embed_tokens.weight" in wanted):
                raise CheckpointError(f"{path}: unknown tensor {key}; the config.json beside it does not describe it")
    missing = [key for key in wanted if key not in where]
    if missing:
        raise CheckpointError(f"{folder}: tensor {missing[0]} is missing"
                              + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
    open_files = {}
    for name, (path, key) in where.items():
        if path not in open_files:
            open_files[path] = TensorFile(path)
        tensor = open_files[path].get(key)
        if tensor.shape != wanted[name]:
            raise CheckpointError(f"{path}: tensor {key} has shape {tuple(tensor.shape)}, "
                                  f"expected {tuple(wanted[name])}")
        yield name, tensor


def load_tensors(llava: Llava, towers: list[str], folder: Path, dtype: torch.dtype, device: str | torch.device,
                 rename=canonical_key) -> None:
    """Fill some towers of a model that lies on the meta device, one tensor at a time."""
    place, shapes = {}, {}
    for tower in towers:
        for name, parameter in getattr(llava, tower).named_parameters():
            key = published_key(tower, name)
            place[key], shapes[key] = (tower, name), parameter.shape
    states = {tower: {} for tower in towers}
    for key, tensor in read_tensors(folder, shapes, rename):
        tower, name = place[key]
        states[tower][name] = tensor.to(device=device, dtype=dtype).contiguous()
    for tower in towers:
        getattr(llava, tower).load_state_dict(states[tower], strict=True, assign=True)


def read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a language model's folder needs its tokenizer in this form")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:   # the tokenizers library raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def describe_llava(folder: Path) -> Llava:
    """All of a LLaVA folder but its weights: the model on the meta device, with its tokenizer."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "llava":
        raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}, expected 'llava'; to join a CLIP and a "
                              "Qwen folder use Llava.from_parts (train.py: --vision and --llm)")
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{path}: {part} is {config.get(part)!r}, expected an object")
    expect(path, config, "vision_feature_select_strategy", "default")
    expect(path, config, "projector_hidden_act", "gelu")
    expect(path, config, "multimodal_projector_bias", True)
    if config["vision_config"].get("model_type", "clip_vision_model") != "clip_vision_model":
        raise CheckpointError(f"{path}: the vision tower is of type {config['vision_config']['model_type']!r}; this code "
                              "reads clip_vision_model")
    vision = read_vision_config(path, config["vision_config"])
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -vision.n_layer - 1 <= layer <= -1:
        raise CheckpointError(f"{path}: vision_feature_layer is {layer!r}, expected a negative number down to "
                              f"-{vision.n_layer + 1}")
    vision.feature_layer = layer
    text = read_decoder_config(path, config["text_config"])
    image_token_id = config.get("image_token_index", config.get("image_token_id"))
    if not isinstance(image_token_id, int) or not 0 <= image_token_id < text.vocab_size:
        raise CheckpointError(f"{path}: image_token_index is {image_token_id!r}, expected an id below vocab_size "
                              f"{text.vocab_size}")

    def special(name: str) -> object:
        value = config[name] if config.get(name) is not None else config["text_config"].get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < text.vocab_size for token in ids):
            raise CheckpointError(f"{path}: {name} is {shorten(value)}, expected an id below vocab_size {text.vocab_size}")
        return value

    template = config.get("template")
    if template is not None and template not in list(TEMPLATE_FILES):
        raise CheckpointError(f"{path}: template is {shorten(template)}, expected one of {', '.join(TEMPLATE_FILES)}")
    llava_config = LlavaConfig(vision, text, image_token_id, special("pad_token_id"), special("eos_token_id"), template)
    tokenizer = read_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None and tokenizer.token_to_id(IMAGE_TOKEN) != image_token_id:
        raise CheckpointError(f"{folder}: tokenizer.json gives {IMAGE_TOKEN} the id {tokenizer.token_to_id(IMAGE_TOKEN)}, "
                              f"config.json {image_token_id}; the two files are not of one checkpoint")
    with torch.device("meta"):
        return Llava(llava_config, tokenizer)


def load_llava(folder: Path, dtype: torch.dtype, device: str | torch.device) -> Llava:
    llava = describe_llava(folder)
    load_tensors(llava, list(TOWERS), folder, dtype, device)
    return llava


def describe_parts(vision_folder: Path, llm_folder: Path, template: str) -> Llava:
    """The same of a new model, before its vocabulary grows."""
    if template not in TEMPLATE_FILES:
        raise CheckpointError(f"template is {template!r}, expected one of {', '.join(TEMPLATE_FILES)}")
    path = vision_folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"{path}: model_type is {kind!r}, expected 'clip' or 'clip_vision_model'")
    vision = read_vision_config(path, config if kind == "clip_vision_model" else take_object(path, config, "vision_config"))
    text = read_decoder_config(llm_folder / "config.json", read_json(llm_folder / "config.json"))

    tokenizer = read_tokenizer(llm_folder)
    for token in (IMAGE_TOKEN, PAD_TOKEN):   # the first free ids; for Qwen1.5/2 151646 and 151647
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    end_token = TEMPLATE_FILES[template]["end"]
    eos_token_id = tokenizer.token_to_id(end_token)
    if eos_token_id is None:
        raise CheckpointError(f"{llm_folder / 'tokenizer.json'}: has no token {end_token}, with which template "
                              f"{template!r} ends an answer")
    llava_config = LlavaConfig(vision, text, tokenizer.token_to_id(IMAGE_TOKEN), tokenizer.token_to_id(PAD_TOKEN),
                               eos_token_id, template)
    with torch.device("meta"):
        return Llava(llava_config, tokenizer)


def assemble_llava(vision_folder: Path, llm_folder: Path, seed: int, template: str) -> Llava:
    llava = describe_parts(vision_folder, llm_folder, template)
    # Some CLIP folders hold the vision tower alone, with or without its prefix, some the text tower as well.
    load_tensors(llava, ["vision"], vision_folder, torch.float32, "cpu",
                 rename=lambda key: TOWERS["vision"][0] + key.removeprefix("vision_model."))
    load_tensors(llava, ["decoder"], llm_folder, torch.float32, "cpu", rename=lambda key: TOWERS["decoder"][0] + key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava.adaptor = Adaptor(llava.config.vision.n_embd, llava.config.text.n_embd)
    grow_vocabulary(llava, max(llava.config.image_token_id, llava.config.pad_token_id) + 1)
    return llava


def grow_vocabulary(llava: Llava, needed: int) -> None:
    """Give embedding and head at least `needed` rows, a multiple of 64. Qwen's matrices have spare rows: no change."""
    text = llava.config.text
    if needed <= text.vocab_size:
        return
    text.vocab_size = (needed + 63) // 64 * 64
    for module in [llava.decoder.embedding] + ([] if text.tied else [llava.decoder.lm_head]):
        old = module.weight.data
        new = old.mean(0, keepdim=True).expand(text.vocab_size - len(old), -1)   # neither likely nor unlikely
        module.weight = nn.Parameter(torch.cat([old, new]))
    llava.decoder.embedding.num_embeddings = text.vocab_size


# -----------------------------------------------------------------------------
# Writing

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
# as in data.py, which transforms with them; a test compares the two
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# Each template's end-of-answer token, and the template once more in the language that transformers' processors speak.
# data.py renders conversations for training and evaluation; a test holds the two against each other.
PARTS = ("{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
         "{%- if part['type'] == 'image' -%}{{ '<image>\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
         "{%- endif -%}{%- endmacro -%}")
TEMPLATE_FILES = {
    "vicuna": {
        "end": "<|endoftext|>",
        "jinja": PARTS
        + "{{ \"A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. \" }}"
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{ 'USER: ' + text(message['content']) + ' ASSISTANT:' }}"
        "{%- else -%}{{ ' ' + text(message['content']) + '<|endoftext|>' }}{%- endif -%}{%- endfor -%}",
    },
    "chatml": {
        "end": "<|im_end|>",
        "jinja": PARTS + "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + text(message['content']) + '<|im_end|>\n' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    },
}


def config_files(llava: Llava, dtype: torch.dtype) -> dict[str, dict]:
    """The JSON files of a LLaVA folder, by name."""
    config, vision, text = llava.config, llava.config.vision, llava.config.text
    ends = {"pad_token_id": config.pad_token_id, "eos_token_id": config.eos_token_id}
    text_config = {
        "model_type": "qwen2_moe" if text.num_experts else "qwen2",
        "vocab_size": text.vocab_size, "hidden_size": text.n_embd, "num_hidden_layers": text.n_layer,
        "num_attention_heads": text.n_head, "num_key_value_heads": text.n_kv_head, "intermediate_size": text.ffn,
        "hidden_act": "silu", "rms_norm_eps": text.norm_eps, "rope_theta": text.rope_theta,
        # the same once more, as transformers 5 spells it
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "max_position_embeddings": text.max_positions, "use_sliding_window": False, "attention_dropout": 0.0,
        "tie_word_embeddings": text.tied, **ends,
    }
    if text.num_experts:
        text_config |= {
            "num_experts": text.num_experts, "num_experts_per_tok": text.top_k, "norm_topk_prob": text.norm_topk,
            "moe_intermediate_size": text.ffn, "shared_expert_intermediate_size": 0, "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(text.n_layer) if i not in text.sparse_layers],
        }
    vision_config = {
        "model_type": "clip_vision_model", "image_size": vision.image_size, "patch_size": vision.patch_size,
        "hidden_size": vision.n_embd, "num_hidden_layers": vision.n_layer, "num_attention_heads": vision.n_head,
        "intermediate_size": vision.ffn, "hidden_act": "quick_gelu", "layer_norm_eps": vision.norm_eps,
        "num_channels": 3, "projection_dim": 768,
    }
    square = {"height": vision.image_size, "width": vision.image_size}
    files = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
            "dtype": str(dtype).removeprefix("torch."), "template": config.template,
            "vision_config": vision_config, "text_config": text_config,
            "image_token_index": config.image_token_id, "image_seq_length": config.image_tokens,
            "vision_feature_layer": vision.feature_layer, "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": text.tied, **ends,
        },
        "generation_config.json": {"do_sample": False, **ends},
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_pad": True, "do_resize": True, "size": {"shortest_edge": vision.image_size},
            "resample": 3, "do_center_crop": True, "crop_size": square, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",   # + CLS, and it is dropped
        },
    }
    if llava.tokenizer is not None:
        token = lambda i: None if i is None or not isinstance(i, int) else llava.tokenizer.id_to_token(i)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor",
            "eos_token": token(config.eos_token_id), "pad_token": token(config.pad_token_id),
            "extra_special_tokens": {"image_token": IMAGE_TOKEN}, "padding_side": "right",
            "model_max_length": text.max_positions, "clean_up_tokenization_spaces": False,
        }
        if config.template is not None:
            files["tokenizer_config.json"]["chat_template"] = TEMPLATE_FILES[config.template]["jinja"]
    return files


def write_file(path: Path, text: str) -> None:
    """Beside its place, then renamed: a reader never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


def published_tensors(llava: Llava, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    weights = weights or dict(llava.named_parameters())
    tensors = {published_key(*name.split(".", 1)): tensor.detach() for name, tensor in weights.items()}
    D = llava.config.text.n_embd
    for i in llava.config.text.sparse_layers:                        # see SHARED_EXPERT
        mlp = f"language_model.model.layers.{i}.mlp."
        empty = {"shared_expert.gate_proj": (0, D), "shared_expert.up_proj": (0, D), "shared_expert.down_proj": (D, 0),
                 "shared_expert_gate": (1, D)}
        tensors |= {f"{mlp}{name}.weight": torch.zeros(shape) for name, shape in empty.items()}
    return tensors


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype | None = None,
                 max_shard_bytes: int = 5 * 10**9) -> None:
    """`model.safetensors`, or shards of at most `max_shard_bytes` with an index."""
    shards, room = [[]], max_shard_bytes
    for key, tensor in tensors.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, keys in zip(names, shards):
        part = {key: tensors[key].to(device="cpu", dtype=dtype or tensors[key].dtype).contiguous() for key in keys}
        save_file(part, folder / (name + ".tmp"), metadata={"format": "pt"})
    # One file is swapped for another at a stroke, several are not: a kill in between must not leave shards of two saves
    # that look like one. So the index goes first and comes back last; without it the folder cannot be opened.
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        for first in (index, folder / "model.safetensors"):
            first.unlink(missing_ok=True)
    for name in names:
        os.replace(folder / (name + ".tmp"), folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        total = sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors.values())
        write_file(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    else:
        index.unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):                    # of an earlier save with another number of shards
        if old.name not in names:
            old.unlink()


def save_llava(llava: Llava, folder: Path, dtype: torch.dtype | None = None,
               weights: dict[str, torch.Tensor] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(published_tensors(llava, weights), folder, dtype)
    if llava.tokenizer is not None:
        write_file(folder / "tokenizer.json", llava.tokenizer.to_str(pretty=True))
        if llava.config.template is not None:
            write_file(folder / "chat_template.jinja", TEMPLATE_FILES[llava.config.template]["jinja"])
    for name, content in config_files(llava, dtype or llava.adaptor.linear_1.weight.dtype).items():
        write_file(folder / name, json.dumps(content, indent=2))
