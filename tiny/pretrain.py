"""
The base checkpoints, a vision tower and two language models, trained on the embedded world; Hugging Face folders.

The vision tower takes the place of CLIP. CLIP pulls an image towards the vector of its caption, 400 million
times. Here every cell is pulled towards the code of its thing plus the code of its color, and all codes are
fixed and orthogonal. So the patch features can be read by inner products alone, which makes them easy to
translate for the adaptor.

The language models take the place of Qwen. A real one has been trained on trillions of words to look things
up in its context. A tiny one needs that skill before it sees an image; without it, yes/no answers stay at
chance. It is trained on scenes in words: a sheet of 4x4 cells takes the image's place in the conversation,
and the words of one object ("red kite") share a cell, their embeddings added. These texts hold no wrong
answer; noise and bias come with the images later.

Questions alone are slow to train on, because an answer is far from the word that it depends on. So the
first steps are drills, "kite red . bus no . blue cup .": look up the word before. After that, questions
take a few hundred steps.
"""
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from torch import nn

from data import pad_right, render, transform_image
from engine.files import write_json, write_text
from engine.hf import IMAGE_TOKEN, TOWERS, config_files, published_key, save_tensors
from model import DecoderConfig, Llava, LlavaConfig, VisionConfig
from tiny.language import CAPTION_PROMPTS, SHORT, SYSTEM, caption, make_question, make_tokenizer
from tiny.rows import conversation
from tiny.scene import CELL, GRID, Scene, draw_scene, make_scene
from tiny.things import COLORS, THINGS

VISION = VisionConfig(image_size=GRID * CELL, patch_size=CELL, n_embd=128, n_layer=3, n_head=4, n_ffn=512)
VISION_SCENES, VISION_BATCH, VISION_STEPS = 3000, 48, 400

WIDTHS = {"llm_teacher": 128, "llm_student": 64}
LANGUAGE_STEPS = {"llm_teacher": 1350, "llm_student": 1800}        # drills included
DRILL_STEPS = {"llm_teacher": 200, "llm_student": 300}
DRILL_SHARE = 0.15                    # of later rows: looking up is not forgotten
LANGUAGE_BATCH = 16
CAPTION_SHARE = 0.5                   # of the rows that are no drills
CONTEXT_WEIGHT = 0.02                 # of a token that is not an answer, in the loss


# -----------------------------------------------------------------------------
# What vision tower and language models share

def blank_model(width: int, seed: int) -> Llava:
    """An untrained Llava of tiny size. Each of its parts is trained and saved by itself."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    text = DecoderConfig(vocab_size=128, n_embd=width, n_layer=4, n_head=4, n_kv_head=2, n_ffn=width * 11 // 4,
                         rope_theta=100.0, tied=True, max_positions=512)
    torch.manual_seed(seed)
    llava = Llava(LlavaConfig(VISION, text, tokenizer.token_to_id(IMAGE_TOKEN), pad_token_id=None,
                              eos_token_id=tokenizer.token_to_id("<|endoftext|>"), template="vicuna"), tokenizer)
    for name, parameter in llava.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 if name.startswith("vision") else 0.05)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return llava


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    parameters = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def lr_at(step: int, steps: int, peak: float) -> float:
    """A warm-up of 20 steps, and a linear decay over the last third."""
    return peak * min((step + 1) / 20, 1, 3 * (steps - step) / steps)


def save_base(llava: Llava, tower: str, folder: Path) -> None:
    """One tower ("vision" or "decoder") as a Hugging Face folder of its own."""
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    prefix = TOWERS[tower][0].split(".")[0] + "."               # "vision_tower." or "language_model."
    tensors = {published_key(tower, name).removeprefix(prefix): parameter.detach()
               for name, parameter in getattr(llava, tower).named_parameters()}
    save_tensors(tensors, tmp)

    key, architecture = {"vision": ("vision_config", "CLIPVisionModel"),
                         "decoder": ("text_config", "Qwen2ForCausalLM")}[tower]
    config = config_files(llava, torch.float32)["config.json"][key]
    write_json(tmp / "config.json", {"architectures": [architecture], "dtype": "float32", **config})
    if tower == "decoder":
        # The tokenizer goes without <image>, which from_parts adds. Its class: words, not Qwen2's byte pairs.
        write_text(tmp / "tokenizer.json", make_tokenizer().to_str(pretty=True))
        write_json(tmp / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(tmp, folder)


# -----------------------------------------------------------------------------
# The vision tower

KINDS = ["nothing", *THINGS, "label"]            # what a cell shows ...
ATTRIBUTES = [*COLORS, *range(10)]               # ... and in which color, or with which digit
CODE_LENGTH = 8                                  # of a code; the sum of two gives features of variance 1


def make_vision(out_dir: Path, seed: int, scale: float) -> dict:
    """Train the features that LLaVA uses, those before the last block, which keeps its initial weights."""
    llava, rng = blank_model(64, seed), random.Random(f"{seed} vision")
    steps = max(2, round(scale * VISION_STEPS))
    pixels, kinds, attributes = labeled_scenes(rng, max(VISION_BATCH, round(scale * VISION_SCENES)), "train")
    # orthogonal rows, (kinds + attributes, Dv)
    codes = CODE_LENGTH * torch.linalg.qr(torch.randn(VISION.n_embd, len(KINDS) + len(ATTRIBUTES)))[0].T
    kind_weight = torch.ones(len(KINDS))
    kind_weight[0] = 0.1                                     # most cells are empty

    optimizer = make_optimizer(llava.vision.parameters())
    for step in range(steps):
        rows = torch.randint(len(pixels), (VISION_BATCH,))
        features, kind_scores, attribute_scores = read_cells(llava, pixels[rows], codes)
        loss = (F.cross_entropy(kind_scores.flatten(0, 1), kinds[rows].flatten(), weight=kind_weight)
                + F.cross_entropy(attribute_scores.flatten(0, 1), attributes[rows].flatten())
                + 0.02 * features.pow(2).mean())             # nothing in the features but the codes
        update(optimizer, loss, lr_at(step, steps, peak=1e-3))

    pixels, kinds, attributes = labeled_scenes(rng, max(30, round(min(1, scale) * 300)), "test")
    with torch.no_grad():
        _, kind_scores, attribute_scores = read_cells(llava, pixels, codes)
    is_label = kinds == len(KINDS) - 1
    is_thing = (kinds > 0) & ~is_label
    right_kind = kind_scores.argmax(-1) == kinds
    right_attribute = attribute_scores.argmax(-1) == attributes
    measured = {"cells": right_kind, "things": right_kind[is_thing],
                "colors": right_attribute[is_thing], "digits": right_attribute[is_label]}
    save_base(llava, "vision", out_dir / "base" / "vision")
    accuracy = {name: round(100 * hits.float().mean().item(), 2) for name, hits in measured.items()}
    return {"held-out accuracy": accuracy}


def read_cells(llava: Llava, pixels: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, 3, S, S) -> features (B, P, Dv), kind scores (B, P, kinds), attribute scores (B, P, attributes)."""
    features = llava.vision(pixels)
    scores = features @ codes.T / CODE_LENGTH
    return features, *scores.split([len(KINDS), len(ATTRIBUTES)], dim=-1)


def labeled_scenes(rng: random.Random, n: int, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> pictures (n, 3, S, S) and what is in each cell: kinds (n, P), attributes (n, P), -100 for none."""
    pixels, kinds = [], torch.zeros(n, VISION.patches, dtype=torch.long)
    attributes = torch.full((n, VISION.patches), -100)
    for i in range(n):
        scene = make_scene(rng, split)
        pixels.append(transform_image(draw_scene(scene, rng), VISION.image_size))
        for color, thing, cell in scene.objects:
            kinds[i, cell], attributes[i, cell] = KINDS.index(thing), ATTRIBUTES.index(color)
        if scene.label is not None:
            digit, cell = scene.label
            kinds[i, cell], attributes[i, cell] = KINDS.index("label"), ATTRIBUTES.index(digit)
    return torch.stack(pixels), kinds, attributes


# -----------------------------------------------------------------------------
# The language models

def make_language_model(part: str, out_dir: Path, seed: int, scale: float) -> dict:
    """`part`: "llm_teacher" or "llm_student"."""
    llava, rng = blank_model(WIDTHS[part], seed), random.Random(f"{seed} {part}")
    tokenizer = llava.tokenizer
    drills, steps = round(scale * DRILL_STEPS[part]), max(2, round(scale * LANGUAGE_STEPS[part]))

    optimizer = make_optimizer(llava.decoder.parameters())
    for step in range(steps):
        is_drill = [step < drills or rng.random() < DRILL_SHARE for _ in range(LANGUAGE_BATCH)]
        rows = [(drill_row if drill else text_row)(make_scene(rng, "train"), rng, tokenizer) for drill in is_drill]
        ids, mask, sheets = stack_rows(rows)
        logits, targets, mask = read_sheets(llava, ids, sheets)[:, :-1], ids[:, 1:], mask[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        answers, context = mask == 1, mask == 0                                  # padding is -1
        loss = (answers * losses + CONTEXT_WEIGHT * context * losses).sum() / answers.sum()
        update(optimizer, loss, lr_at(step, steps, peak=1.5e-3))

    measured = {}
    for kind in ("exist", "color", "count", "which", "caption"):
        n = max(20, round(min(1, scale) * 200))
        rows = [text_row(make_scene(rng, "test"), rng, tokenizer, kind) for _ in range(n)]
        ids, mask, sheets = stack_rows(rows)
        with torch.no_grad():
            guesses = read_sheets(llava, ids, sheets)[:, :-1].argmax(-1)
        right = (guesses == ids[:, 1:]) | (mask[:, 1:] != 1)
        measured[kind] = round(100 * right.all(1).float().mean().item(), 1)      # whole answers
    save_base(llava, "decoder", out_dir / "base" / part)
    return {"held-out accuracy": measured}


def read_sheets(llava: Llava, ids: torch.Tensor, sheets: torch.Tensor) -> torch.Tensor:
    """(B, T) ids and (B, P, 3) words of the cells -> logits (B, T, V)."""
    words = llava.decoder.embedding(sheets.clamp(min=0)) * (sheets >= 0)[..., None]        # (B, P, 3, D)
    x = llava.decoder.embedding(ids)                                                       # (B, T, D)
    x = x.masked_scatter((ids == llava.config.image_token_id)[:, :, None], words.sum(2))
    return llava.decoder.head(llava.decoder(x)[0])


# A row is (ids, mask, sheet): the mask is 1 on answers, the sheet holds the words of each cell.

def drill_row(scene: Scene, rng: random.Random, tokenizer: Tokenizer) -> tuple[list[int], list[int], torch.Tensor]:
    """A thing is answered by its color or by "no", a color by its thing."""
    ids = tokenizer.encode(f"{SYSTEM} USER: {IMAGE_TOKEN * VISION.patches}").ids
    mask = [0] * len(ids)
    colors = scene.colors()
    things = scene.things() + rng.sample(scene.absent_things(), len(scene.objects))
    rng.shuffle(things)
    for thing in things:
        word, answer = thing, colors.get(thing, "no")
        if thing in colors and rng.random() < 0.5:
            word, answer = answer, word
        for text, is_answer in ((word, 0), (answer, 1), (".", 0)):
            new = tokenizer.encode(text).ids
            ids, mask = ids + new, mask + [is_answer] * len(new)
    return ids, mask, make_sheet(scene, tokenizer)


def text_row(scene: Scene, rng: random.Random, tokenizer: Tokenizer,
             kind: str | None = None) -> tuple[list[int], list[int], torch.Tensor]:
    """A question of one kind, or the caption, in exactly the form of the rows with images."""
    if kind == "caption" or (kind is None and rng.random() < CAPTION_SHARE):
        question, answer = rng.choice(CAPTION_PROMPTS), caption(scene)
    else:
        kinds = ["exist", "color", "count", "which"] + ["label"] * (scene.label is not None)
        _, question, answer, _ = make_question(scene, rng, kind or rng.choice(kinds))       # kinds in equal shares
        question += f"\n{SHORT}"
    ids, mask = render(conversation(question, answer), tokenizer, image_tokens=VISION.patches)
    return ids, mask, make_sheet(scene, tokenizer)


def make_sheet(scene: Scene, tokenizer: Tokenizer) -> torch.Tensor:
    """The words of each cell, (P, 3) ids, -1 where there is no word."""
    sheet = torch.full((GRID * GRID, 3), -1)
    texts = [(cell, f"{color} {thing}") for color, thing, cell in scene.objects]
    if scene.label is not None:
        texts.append((scene.label[1], f"label {scene.label[0]}"))
    for cell, text in texts:
        ids = tokenizer.encode(text).ids
        sheet[cell, :len(ids)] = torch.tensor(ids)
    return sheet


def stack_rows(rows: list[tuple]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> ids (B, T), mask (B, T) with -1 for padding, sheets (B, P, 3)."""
    ids, masks, sheets = zip(*rows)
    return pad_right(ids, 0), pad_right(masks, -1), torch.stack(sheets)
