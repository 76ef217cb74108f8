"""
The loss without logits.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F


CHUNK = {"cpu": 48, "cuda": 256}    # tokens whose softmax exists at a time: in fp32, and several times over
PER_PRODUCT = 4     # chunks that go through the head together, in bf16: a matrix product of few tokens is a slow one


def chunked_loss(hidden: torch.Tensor, weight: torch.Tensor, loss: Callable[[torch.Tensor, slice], tuple],
              chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A per-token loss of logits = hidden @ weight.T, computed a few tokens at a time: (N, D), (V, D) -> (N,), (K, N).

    By definition it equals `loss(F.linear(hidden, weight), slice(0, N))`, gradients included, and tests hold it to that.
    `loss` gets the logits (n, V) of the tokens in a slice, and returns what is minimised (n,) and a list of K terms to
    report (at least one), (n,) each. Matrix products run in autocast's dtype, where that is on.

    If `weight` learns, every token must weigh the same in what follows (a plain sum), or the backward raises ValueError:
    the head's gradient is summed over the tokens before it is known how much each will count.
    """
    return ChunkedLoss.apply(hidden, weight, loss, chunk or CHUNK[hidden.device.type])


def slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


class ChunkedLoss(torch.autograd.Function):
    """`chunked_loss`. Gradients are taken at once, while the logits are there; the backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, chunk):
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x, w = hidden.detach().to(dtype), weight.detach()
        values, terms = [], []
        grad_hidden = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # summed over chunks in at least fp32, whatever the products are computed in
        grad_weight = (torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
                       if ctx.needs_input_grad[1] else None)
        learns = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False), torch.set_grad_enabled(learns):
            for group in slices(0, len(x), PER_PRODUCT * chunk):
                logits = head_forward(x[group], w)                                               # (g, V), in bf16
                for part in slices(group.start, group.stop, chunk):
                    place = logits[part.start - group.start:part.stop - group.start]             # (n, V)
                    leaf = place.detach().requires_grad_(learns)
                    value, reported = loss(leaf, part)
                    values.append(value.detach().clone())                        # its own memory, should it be a view
                    terms.append(torch.stack(reported).detach())
                    if learns:
                        place.copy_(*torch.autograd.grad(value.sum(), leaf))     # the logits make way for their gradient
                    del leaf, value, reported                                    # nothing of them beside the next chunk
                if grad_hidden is not None:
                    grad_hidden[group] = head_backward(logits, w)
                if grad_weight is not None:
                    accumulate_head_grad(grad_weight, logits, x[group])
                del logits, place                                                # nor beside the next product
        ctx.grad_hidden, ctx.grad_weight, ctx.dtypes = grad_hidden, grad_weight, (hidden.dtype, weight.dtype)
        values, terms = torch.cat(values), torch.cat(terms, dim=1)
        ctx.mark_non_differentiable(terms)
        return values, terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        grad_hidden, grad_weight, (hidden_dtype, weight_dtype) = ctx.grad_hidden, ctx.grad_weight, ctx.dtypes
        ctx.grad_hidden = ctx.grad_weight = None
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad[:, None]).to(hidden_dtype)
        if grad_weight is not None:
            if bool((grad != grad[0]).any()):
                raise ValueError("a head that learns needs the plain sum of the token losses, not a weighted one")
            grad_weight = grad_weight.mul_(grad[0]).to(weight_dtype)
        return grad_hidden, grad_weight, None, None


# A head that learns is kept in fp32. Its products go by blocks of its rows, so that neither its copy in bf16 nor what one
# product adds to its gradient ever exists as a whole. The casts are made anew each time, and cost little beside the
# products: a block is used while it is still in a cache.
ROWS = {"cpu": 2048, "cuda": 32768}


def head_forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in the dtype of x: (n, D), (V, D) -> (n, V)."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    logits, rows = x.new_empty(len(x), len(weight)), ROWS[x.device.type]
    for columns, block in zip(logits.split(rows, dim=1), weight.split(rows)):
        columns.copy_(F.linear(x, block.to(x.dtype)))
    return logits


def head_backward(grad_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """grad_logits @ weight in the dtype of grad_logits: (n, V), (V, D) -> (n, D)."""
    dtype, rows = grad_logits.dtype, ROWS[grad_logits.device.type]
    if weight.dtype == dtype:
        return grad_logits @ weight
    blocks = zip(grad_logits.split(rows, dim=1), weight.split(rows))
    return sum((columns @ block.to(dtype)).float() for columns, block in blocks).to(dtype)


def accumulate_head_grad(grad_weight: torch.Tensor, grad_logits: torch.Tensor, x: torch.Tensor) -> None:
    """grad_weight += grad_logits.T @ x: (V, D), (n, V), (n, D)."""
    rows = ROWS[x.device.type]
    for block, columns in zip(grad_weight.split(rows), grad_logits.split(rows, dim=1)):
        block.add_(columns.T @ x)
