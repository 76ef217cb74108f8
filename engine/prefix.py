"""
Prompts that begin alike: their common prefix is read once.

GQA asks 12,578 questions about 398 images, POPE about ten per image. An image is 576 positions, a question twenty:

    system … <image> × 576 USER: │ Is there a dog?           one prefix, read once: ViT, adaptor and decoder;
                                 │ What color is the car?    its keys and values are copied to the row of each question,
                                 │ Is the man sitting?       and only what follows it is read row by row

Attention is causal, so a position's keys and values do not depend on what comes after it: the answers are the same.
"""
from collections.abc import Hashable
from os.path import commonprefix

import torch

from data import pad_right
from model import Llava


@torch.no_grad()
def generate(llava: Llava, prompts: list[list[int]], images: list[list[Hashable]], pixels: dict[Hashable, torch.Tensor],
             max_new_tokens: int, **settings) -> torch.Tensor:
    """`llava.generate` of prompts, some of which show the same images -> the new tokens (B, new).

    prompts: each row's ids; images: names of each row's images in reading order; pixels: (3, S, S) by name.
    """
    device, padding = llava.decoder.embedding.weight.device, llava.config.pad_token_id or 0
    groups = {}                                                      # the images of a prompt -> rows that show them
    for row, names in enumerate(images):
        groups.setdefault(tuple(names), []).append(row)
    shared = [shared_length([prompts[row] for row in rows], llava) for rows in groups.values()]

    def prepare(rows: list[list[int]], names: list[Hashable]) -> tuple[torch.Tensor, torch.Tensor | None]:
        stacked = torch.stack([pixels[name] for name in names]).to(device) if names else None    # (N, 3, S, S)
        return pad_right(rows, padding).to(device), stacked

    if len(groups) == len(prompts) or not any(shared):               # nothing is shared
        return llava.generate(*prepare(prompts, [name for names in images for name in names]), max_new_tokens, **settings)

    beginnings, rests, in_prefix, in_rest, group_of = [], {}, [], {}, {}
    for i, (names, rows, length) in enumerate(zip(groups, groups.values(), shared)):
        beginnings.append(prompts[rows[0]][:length])
        n_images = beginnings[-1].count(llava.config.image_token_id) // llava.config.image_tokens
        in_prefix += names[:n_images]
        for row in rows:
            rests[row], in_rest[row], group_of[row] = prompts[row][length:], names[n_images:], i
    order = range(len(prompts))
    prefixes = llava.make_cache(len(groups))
    llava.read(*prepare(beginnings, in_prefix), prefixes)
    rest_ids, rest_pixels = prepare([rests[row] for row in order], [name for row in order for name in in_rest[row]])
    cache = prefixes.copy_rows(torch.tensor([group_of[row] for row in order], device=device),
                               rest_ids.shape[1] + max_new_tokens)
    return llava.generate(rest_ids, rest_pixels, max_new_tokens, cache=cache, **settings)


def shared_length(prompts: list[list[int]], llava: Llava) -> int:
    """How many ids all prompts begin with. The prefix ends before a prompt's last token, and not within an image."""
    prefix = commonprefix([prompt[:-1] for prompt in prompts])
    inside = prefix.count(llava.config.image_token_id) % llava.config.image_tokens
    return len(prefix) - inside
