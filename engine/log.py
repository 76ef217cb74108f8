"""
What a training run says: the lines before the first step, a record per step for log.jsonl, the same on the screen, and
what it says when a loss is not a number.
"""
import torch
from torch import nn

from configurator import Config
from engine.distributed import Dist, local
from model import Llava


def introduction(config: Config, student: Llava, teacher: Llava | None, rows: int, world_size: int) -> list[str]:
    """What is trained, on what, against which teacher."""
    counts = student.count_parameters()
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    lines = [f"stage {config.stage}: {counts['vision'] + counts['adaptor'] + counts['decoder']:,} parameters "
             f"(decoder {counts['decoder']:,}, {counts['decoder_active']:,} active per token), {trainable:,} trainable",
             f"{rows:,} rows, {config.batch_size} a step = {world_size} ranks x "
             f"{config.batch_size // (config.micro_batch_size * world_size)} micro-batches x {config.micro_batch_size}"]
    if config.teacher_cache:
        lines += [f"teacher: its outputs are read from {config.teacher_cache}"]
    elif teacher is not None:
        lines += [f"teacher: {sum(p.numel() for p in teacher.decoder.parameters()):,} decoder parameters, frozen, "
                  f"{'sharing the ViT with the student' if teacher.vision is student.vision else 'with a ViT of its own'}"]
    return lines


def record(step: int, loss: float, parts: dict[str, torch.Tensor], lr: float, grad_norm: float, tokens: int,
           seconds: float) -> dict:
    """One line of log.jsonl. image_load, text_load: the share of a layer's assignments that each expert got, [layer][expert]."""
    record = {"step": step, "loss": loss}
    record |= {name: value.item() for name, value in parts.items() if name != "counts"}
    record |= {"lr": lr, "grad_norm": grad_norm, "tokens": tokens, "tokens_per_s": round(tokens / seconds),
               "seconds": round(seconds, 4)}
    if "counts" in parts:
        load = parts["counts"] / parts["counts"].sum(-1, keepdim=True).clamp(min=1)              # (layers, 2, E)
        for i, key in enumerate(("image_load", "text_load")):
            record[key] = [[round(share, 4) for share in layer] for layer in load[:, i].tolist()]
    return record


def answers(total: dict[str, int], seconds: float) -> dict:
    """What an on-policy step adds to its record; in another step "on_policy" is 0 and the rest is missing."""
    if not total["answers"]:
        return {"on_policy": 0}
    return {"on_policy": 1, "answer_tokens": round(total["answer_tokens"] / total["answers"], 2),
            "unfinished": total["unfinished"], "generation_s": round(seconds, 4)}


def line(record: dict, steps: int, seconds_per_step: float) -> str:
    """A record on the screen: everything between "loss" and "lr" is a part of the loss."""
    names = list(record)
    parts = names[names.index("loss") + 1:names.index("lr")]
    left = seconds_per_step * (steps - record["step"])
    return "  ".join([f"step {record['step']}/{steps}", f"loss {record['loss']:.4f}",
                      *[f"{name} {record[name]:.4f}" for name in parts], f"lr {record['lr']:.2e}",
                      f"grad {record['grad_norm']:.3f}", f"{record['tokens_per_s']:,} tok/s", f"{left / 60:.1f} min left"])


def not_finite(step: int, loss: float, grad_norm: float, parts: dict[str, torch.Tensor], trainable: dict[str, nn.Parameter],
               rows: list[str], dist: Dist) -> str:
    """The error line of a loss or gradient that is infinite or NaN: which part of the loss, whose gradient, which rows."""
    finite = [name for name, value in parts.items() if name != "counts" and value.isfinite()]
    broken = [name for name in parts if name != "counts" and name not in finite]
    gradients = torch.tensor([not local(p.grad).isfinite().all() for p in trainable.values()], device=dist.device)
    gradients = [name for name, ranks in zip(trainable, dist.all_reduce(gradients.long()).tolist()) if ranks]
    return (f"step {step}: loss {loss}, gradient norm {grad_norm}; finite parts of the loss: {some(finite)}, not finite: "
            f"{some(broken)}; gradients not finite: {some(gradients)}; the batch: {some(rows)}; the weights were not touched, "
            "and what was saved before is intact")


def some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "none"
