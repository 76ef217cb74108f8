"""
A token loss without the logits of all tokens.

V is 151,936: the logits of a batch, their softmax, its gradient and the teacher's copies of each are by far the largest
tensors of a training step. None of them needs to exist for more than a few tokens at a time:

    for each chunk of tokens:   logits = hidden @ head.T  ->  loss  ->  gradient of the logits  ->  gradient of hidden, head

The gradient of a loss is taken in the forward pass, while a chunk's logits exist, and the backward pass only scales it.
By definition the result equals the plain formula on all logits, gradients included; the tests hold it to that in fp64.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

from losses import TeacherReference

LOGITS = {"cpu": 2_500_000, "cuda": 39_000_000}     # whose softmax exists at a time, in fp32 and several times over: 16 and
                                                    # 256 tokens of Qwen's vocabulary, and all tokens of a tiny one
PER_PRODUCT = {"cpu": 16, "cuda": 4}  # chunks per matrix product: a product of few tokens is a slow one
ROWS = {"cpu": 2048, "cuda": 32768}   # rows of a trained head that are cast and multiplied at a time


def chunked_loss(hidden: torch.Tensor, head: torch.Tensor, loss: Callable[..., tuple], chunk: int | None = None,
                 teacher: TeacherReference | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    loss(F.linear(hidden, head), slice(0, N)), a few tokens at a time: (N, D), (V, D) -> (N,) and the loss's parts by name.

    `loss` gets the logits (n, V) of the tokens in a slice, that slice and, if `teacher` has hidden states and a head, its
    logits (n, V'). It returns what is minimized (n,) and a dict of its parts to report, (n,) each. Products run in
    autocast's dtype, where that is on.
    Raises ValueError in the backward if `head` is trainable and the tokens are not weighted alike (a plain sum): the
    head's gradient is summed over the tokens before their weights are known.
    """
    chunk = chunk or tokens_per_chunk(len(head), hidden.device.type)
    if not torch.is_grad_enabled():                                  # as in validation: then no gradient is computed
        hidden, head = hidden.detach(), head.detach()
    values, parts, names = ChunkedLoss.apply(hidden, head, loss, chunk, teacher)
    return values, dict(zip(names, parts))


def tokens_per_chunk(vocab_size: int, device: str) -> int:
    return max(1, LOGITS[device] // vocab_size)


class ChunkedLoss(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, head, loss, chunk, teacher):
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x, w = hidden.detach().to(dtype), head.detach()
        values, parts = [], []
        grad_hidden = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_head = None
        if ctx.needs_input_grad[1]:   # summed over chunks in at least fp32, whatever dtype the products have
            grad_head = torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        needs_grad = any(ctx.needs_input_grad)
        has_logits = teacher is not None and teacher.head is not None
        with torch.autocast(device, enabled=False), torch.set_grad_enabled(needs_grad):
            for group in slices(0, len(x), PER_PRODUCT[device] * chunk):
                logits = head_forward(x[group], w)                                               # (g, V), in bf16
                teacher_logits = F.linear(teacher.hidden[group], teacher.head) if has_logits else None           # (g, V')
                for part in slices(group.start, group.stop, chunk):
                    within = slice(part.start - group.start, part.stop - group.start)
                    view = logits[within]                                                        # (n, V)
                    leaf = view.detach().requires_grad_(needs_grad)
                    value, reported = loss(leaf, part, *([teacher_logits[within]] if has_logits else []))
                    values.append(value.detach().clone())            # its own memory, should it be a view of the logits
                    parts.append(torch.stack(list(reported.values())).detach())
                    if needs_grad:
                        view.copy_(*torch.autograd.grad(value.sum(), leaf))      # the gradient overwrites the logits
                    names = tuple(reported)
                    del leaf, value, reported                        # free the softmax before the next chunk
                del teacher_logits
                if grad_hidden is not None:
                    grad_hidden[group] = head_backward(logits, w)
                if grad_head is not None:
                    accumulate_head_grad(grad_head, logits, x[group])
                del logits, view                                     # and the logits before the next product
        ctx.grad_hidden, ctx.grad_head, ctx.dtypes = grad_hidden, grad_head, (hidden.dtype, head.dtype)
        values, parts = torch.cat(values), torch.cat(parts, dim=1)
        ctx.mark_non_differentiable(parts)
        return values, parts, names

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        grad_hidden, grad_head, (hidden_dtype, head_dtype) = ctx.grad_hidden, ctx.grad_head, ctx.dtypes
        ctx.grad_hidden = ctx.grad_head = None
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad[:, None]).to(hidden_dtype)
        if grad_head is not None:
            # The gradient of a plain sum is one number, expanded: then there is nothing to compare, and no GPU to wait for.
            if len(grad) > 1 and grad.stride(0) != 0 and bool((grad != grad[0]).any()):
                raise ValueError("a trainable head needs the plain sum of the token losses, not a weighted one")
            grad_head = grad_head.mul_(grad[0]).to(head_dtype)
        return grad_hidden, grad_head, None, None, None


def slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


# -----------------------------------------------------------------------------
# Products with the head. A trainable head is fp32. Its products go by blocks of its rows, so that neither its copy in bf16
# nor what one product adds to its gradient ever exists as a whole. A block is cast anew for each product and used while it
# is still in a cache, which costs little next to the product itself.

def head_forward(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """x @ head.T in the dtype of x: (n, D), (V, D) -> (n, V)."""
    if head.dtype == x.dtype:
        return F.linear(x, head)
    logits, rows = x.new_empty(len(x), len(head)), ROWS[x.device.type]
    for columns, block in zip(logits.split(rows, dim=1), head.split(rows)):
        columns.copy_(F.linear(x, block.to(x.dtype)))
    return logits


def head_backward(grad_logits: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """grad_logits @ head in the dtype of grad_logits: (n, V), (V, D) -> (n, D)."""
    dtype, rows = grad_logits.dtype, ROWS[grad_logits.device.type]
    if head.dtype == dtype:
        return grad_logits @ head
    blocks = zip(grad_logits.split(rows, dim=1), head.split(rows))
    return sum((columns @ block.to(dtype)).float() for columns, block in blocks).to(dtype)


def accumulate_head_grad(grad_head: torch.Tensor, grad_logits: torch.Tensor, x: torch.Tensor) -> None:
    """grad_head += grad_logits.T @ x: (V, D), (n, V), (n, D)."""
    rows = ROWS[x.device.type]
    for block, columns in zip(grad_head.split(rows), grad_logits.split(rows, dim=1)):
        block.add_(columns.T @ x)
