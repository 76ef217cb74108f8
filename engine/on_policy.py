"""
On-policy distillation: the student answers, the teacher is compared with it on those answers (GKD, arXiv 2306.13649).

Off-policy, the student is trained on the data's answers and then has to go on from its own, mistakes included. In an
on-policy step, the last answer of every row is replaced by one that the student samples now:

    data      system … USER: <image> question 1 ASSISTANT: answer 1  USER: question 2 ASSISTANT: answer 2
    sampled   system … USER: <image> question 1 ASSISTANT: answer 1  USER: question 2 ASSISTANT: what the student says

The distillation losses run on it as on any batch; the cross-entropy does not, since these words are no data. No gradient
goes through the sampling. An answer that reached the length limit has no end token, and none is made up.

Whether a step is on-policy depends on (seed, step) only, and each row's random numbers on (seed, step, row): all ranks
agree, a resumed run samples the same answers, and so does a batch that is cut in another way.
"""
import numpy as np
import torch

from configurator import Config
from data import pad_right
from model import Llava


def is_on_policy(config: Config, step: int) -> bool:
    return config.on_policy > 0 and np.random.default_rng([config.seed, step]).random() < config.on_policy


def sample_answers(student: Llava, batch: dict, rows: list[int], config: Config, step: int) -> tuple[dict, dict[str, int]]:
    """The batch with the student's own last answers, and counts for the log: "answers", "answer_tokens", "unfinished".

    batch: input_ids (B, T), mask (B, T), pixel_values, all on the CPU; rows: their numbers in the data set.
    """
    starts = answer_starts(batch["mask"])
    prompts = [ids[:start].tolist() for ids, start in zip(batch["input_ids"], starts)]
    images = images_of_prompts(batch, starts, student)
    device, pad_id = student.decoder.embedding.weight.device, student.config.pad_token_id
    # row + 1, since numpy pads short seeds with zeros: [seed, step, 0] would repeat the number of is_on_policy.
    generators = [np.random.default_rng([config.seed, step, row + 1]) for row in rows]
    uniforms = np.stack([generator.random(config.on_policy_tokens) for generator in generators])
    new = student.generate(pad_right(prompts, pad_id).to(device), images, config.on_policy_tokens,
                           config.on_policy_temperature, uniforms=torch.from_numpy(uniforms).to(device),
                           banned=student.unanswerable_ids())                                    # (B, new)
    ends = student.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ids, masks, counts = [], [], {"answers": len(rows), "answer_tokens": 0, "unfinished": 0}
    for prompt, answer in zip(prompts, new.tolist()):
        end = next((i for i, token in enumerate(answer) if token in ends), None)
        answer = answer if end is None else answer[:end + 1]         # what follows the end token is padding
        ids.append(prompt + answer)
        masks.append([0] * len(prompt) + [1] * len(answer))
        counts["answer_tokens"] += len(answer)
        counts["unfinished"] += end is None
    return batch | {"input_ids": pad_right(ids, pad_id), "mask": pad_right(masks, 0).bool(), "pixel_values": images,
                    "sampled": torch.ones(len(rows), dtype=torch.bool)}, counts


def answer_starts(mask: torch.Tensor) -> list[int]:
    """(B, T) bool -> for each row, the first position of its last run of ones."""
    begins = mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)             # a one after a zero
    return [int(row.nonzero()[-1]) for row in begins]


def images_of_prompts(batch: dict, starts: list[int], student: Llava) -> torch.Tensor | None:
    """pixel_values without the images after the last answer: a row cut at max_length may end with a question."""
    if batch["pixel_values"] is None:
        return None
    is_image = batch["input_ids"] == student.config.image_token_id                               # (B, T)
    position = torch.arange(is_image.shape[1], device=is_image.device)                           # (T,)
    before = position < torch.tensor(starts, device=is_image.device)[:, None]                    # (B, T)
    kept = before[is_image][::student.config.image_tokens]           # (N,) one of each image's positions
    return batch["pixel_values"][kept] if kept.any() else None
