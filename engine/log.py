"""
What a training run says: the lines before the first step, a record per step for log.jsonl, their means on the screen,
warnings, and what it says when a loss is not a number.
"""
import statistics

import torch
from torch import nn

from configurator import Config
from engine.distributed import Dist, local
from model import Llava


WINDOW = 20          # steps that a warning looks at: one batch says little, since batches are sorted by length
IDLE = 0.01          # an expert with less than this share of its layer's tokens is nearly unused


def introduction(config: Config, student: Llava, teacher: Llava | None, rows: int, world_size: int) -> list[str]:
    """What is trained, on what, against which teacher."""
    counts = student.count_parameters()
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    lines = [f"stage {config.stage}: {counts['vision'] + counts['adaptor'] + counts['decoder']:,} parameters "
             f"(decoder {counts['decoder']:,}, {counts['decoder_active']:,} active per token), {trainable:,} trainable",
             f"{rows - config.val_rows:,} rows, {config.batch_size} a step = {world_size} ranks x "
             f"{config.batch_size // (config.micro_batch_size * world_size)} micro-batches x {config.micro_batch_size}"]
    if config.val_rows:
        lines += [f"{config.val_rows:,} rows are held out: the loss is measured on them, and they are never trained on"]
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


def line(records: list[dict], steps: int, seconds_per_step: float) -> str:
    """The means of several records on the screen: everything between "loss" and "lr" is a part of the loss."""
    last, values = records[-1], {}
    for record in records:
        names = list(record)
        for name in names[names.index("loss"):names.index("lr")]:
            values.setdefault(name, []).append(record[name])
    speed = sum(record["tokens"] for record in records) / sum(record["seconds"] for record in records)
    grad_norm = statistics.fmean(record["grad_norm"] for record in records)
    left = seconds_per_step * (steps - last["step"])
    return "  ".join([f"step {last['step']}/{steps}", *[f"{name} {statistics.fmean(numbers):.4f}" for name, numbers in values.items()],
                      f"lr {last['lr']:.2e}", f"grad {grad_norm:.3f}", f"{speed:,.0f} tok/s",
                      *[f"{last[key]:.1f} GB" for key in ("peak_gb",) if key in last], f"{left / 60:.1f} min left"])


def held_out_line(record: dict, steps: int) -> str:
    numbers = [f"{name.removeprefix('val_')} {value:.4f}" for name, value in record.items() if name.startswith("val_")]
    return "  ".join([f"step {record['step']}/{steps} on held-out rows:", *numbers])


class Warnings:
    """Looks at every WINDOW steps, and says once what goes wrong: a loss above its start, an expert that gets no tokens.

    first: the losses of the run's first steps, as far as they are known already. layers: the numbers of the sparse layers.
    """

    def __init__(self, first: list[float], layers: list[int]):
        self.first, self.layers = first, layers
        self.losses, self.counts = [], 0
        self.has_risen, self.idle = False, set()

    def after(self, record: dict, parts: dict[str, torch.Tensor]) -> list[str]:
        """The warnings after a step; mostly none."""
        self.losses.append(record["loss"])
        if len(self.first) < WINDOW:
            self.first.append(record["loss"])
        self.counts = self.counts + parts["counts"].sum(1) if "counts" in parts else 0           # (layers, E)
        if len(self.losses) < WINDOW:
            return []
        lines, when = [], f"warning: steps {record['step'] - WINDOW + 1} to {record['step']}:"
        # More than a standard deviation: means of 20 steps that differ by chance differ by a third of that.
        mean, start, spread = (f(x) for f, x in [(statistics.fmean, self.losses), (statistics.fmean, self.first),
                                                 (statistics.stdev, self.first)])
        has_risen = mean > start + spread
        if has_risen and not self.has_risen:
            lines.append(f"{when} the mean loss is {mean:.4f}, above the {start:.4f} of the first {WINDOW} steps; is the "
                         "learning rate too high, or the data sorted?")
        idle = set()
        if "counts" in parts:
            load = self.counts / self.counts.sum(1, keepdim=True)
            idle = {(layer, expert) for layer, shares in zip(self.layers, load.tolist())
                    for expert, share in enumerate(shares) if share < IDLE}
        if idle - self.idle:
            names = [f"layer {layer} expert {expert}" for layer, expert in sorted(idle - self.idle)]
            lines.append(f"{when} less than {IDLE:.0%} of the tokens go to {some(names)}; a larger balance_coef spreads them")
        self.losses, self.counts, self.has_risen, self.idle = [], 0, has_risen, idle
        return lines


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
