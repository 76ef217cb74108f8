"""
Every training objective, as pure functions of tensors.

Inputs are already aligned: row n of the logits is what a model predicts for the n-th response token, that is, the logits
at position t stand beside the token at t+1. The caller makes that shift once, for every loss alike (the released code
shifts its cross-entropy and its DPO, but not its distillation mask, and so distils one position late).

Nothing here is reduced: token losses return one value per response token (N,), preferences one per pair (B,). The caller
sums them and divides by the number of response tokens, or of pairs, in the *global* batch, over all micro-batches and
ranks. A mean of means would be another objective whenever lengths differ.

Everything is computed in log space, and in fp32 whatever the logits come in. S is the student (the policy), T the teacher
(the reference model). Shapes: N response tokens, V vocabulary, B pairs.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """bf16 -> fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -----------------------------------------------------------------------------
# Per token

def cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p_S(y_n): (N, V), (N,) -> (N,). Paper eq. 5 (initialisation) and the second term of eq. 7."""
    return F.cross_entropy(at_least_fp32(student_logits), targets, reduction="none")


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(p_T || p_S) = sum_v p_T(v) (log p_T(v) - log p_S(v)): (N, V), (N, V') -> (N,). Paper eq. 6.

    "Forward": the expectation is the teacher's, so wherever the teacher puts mass the student must too. Eq. 6 is printed
    as -E[log(p_T/p_S)], which is minus this; text and code mean plus. The released code minimises the cross-entropy to
    the teacher, -sum p_T log p_S: the same gradient, but a value that never gets near 0. This one is 0 for equal logits.
    Temperature is 1, as in the paper.

    Widths may differ by padding rows only (Qwen2-7B has 152,064 rows, its small siblings 151,936, of one and the same
    tokenizer): both distributions are taken over the rows that the two share.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_p_student = F.log_softmax(at_least_fp32(student_logits[:, :shared]), dim=-1)   # (N, V)
    log_p_teacher = F.log_softmax(at_least_fp32(teacher_logits[:, :shared]), dim=-1)   # (N, V)
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)


def forward_kl_top_k(student_logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor,
                     tail_logprob: torch.Tensor) -> torch.Tensor:
    """The same KL when only the teacher's k most probable tokens are known: (N, V), (N, k), (N, k), (N,) -> (N,).

    All other tokens count as one outcome, whose probability is exp(tail_logprob) for the teacher and 1 - sum_k p_S for the
    student. Merging outcomes can only lose information, so the value is a lower bound of the true KL: how much mass the
    student leaves to the tail is still learned, how it spreads there is not. Dropping the tail, or rescaling the k to
    sum to 1, would be another target and teach the student to be too sure. With k = V nothing is left over, and this is
    `forward_kl`.
    """
    log_p_student = F.log_softmax(at_least_fp32(student_logits), dim=-1).gather(1, top_ids)               # (N, k)
    kl = F.kl_div(log_p_student, top_logprobs, reduction="none", log_target=True).sum(-1)
    if top_ids.shape[1] == student_logits.shape[1]:
        return kl
    mass = log_p_student.logsumexp(-1).exp().clamp(max=1 - torch.finfo(log_p_student.dtype).eps)          # (N,)
    return kl + F.kl_div(torch.log1p(-mass), tail_logprob, reduction="none", log_target=True)


# -----------------------------------------------------------------------------
# Per token, but never all tokens at once. V is 151,936: the logits of a batch, and the softmax, the gradient and the
# teacher's copies of each of them, are by far the largest tensors of a step. They need not exist.

CHUNK = {"cpu": 48, "cuda": 256}    # tokens whose softmax exists at a time: in fp32, and several times over
PER_PRODUCT = 4     # chunks that go through the head together, in bf16: a matrix product of few tokens is a slow one


def by_chunks(hidden: torch.Tensor, weight: torch.Tensor, loss: Callable[[torch.Tensor, slice], tuple],
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
    """`by_chunks`. Gradients are taken at once, while the logits are there; the backward only scales them."""

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
                logits = through_head(x[group], w)                                               # (g, V), in bf16
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
                    grad_hidden[group] = back_through_head(logits, w)
                if grad_weight is not None:
                    add_to_head(grad_weight, logits, x[group])
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


def through_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in the dtype of x: (n, D), (V, D) -> (n, V)."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    logits, rows = x.new_empty(len(x), len(weight)), ROWS[x.device.type]
    for columns, block in zip(logits.split(rows, dim=1), weight.split(rows)):
        columns.copy_(F.linear(x, block.to(x.dtype)))
    return logits


def back_through_head(grad_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """grad_logits @ weight in the dtype of grad_logits: (n, V), (V, D) -> (n, D)."""
    dtype, rows = grad_logits.dtype, ROWS[grad_logits.device.type]
    if weight.dtype == dtype:
        return grad_logits @ weight
    blocks = zip(grad_logits.split(rows, dim=1), weight.split(rows))
    return sum((columns @ block.to(dtype)).float() for columns, block in blocks).to(dtype)


def add_to_head(grad_weight: torch.Tensor, grad_logits: torch.Tensor, x: torch.Tensor) -> None:
    """grad_weight += grad_logits.T @ x: (V, D), (n, V), (n, D)."""
    rows = ROWS[x.device.type]
    for block, columns in zip(grad_weight.split(rows), grad_logits.split(rows, dim=1)):
        block.add_(columns.T @ x)


# -----------------------------------------------------------------------------
# Per pair. All take sums of log-probs over the response tokens of each answer, (B,) each -> (B,). `chosen` and
# `rejected` are the student's, `ref_chosen` and `ref_rejected` the teacher's: the reference of DPO is usually a frozen
# copy of the policy itself, here it is the larger model, so the log-ratios are not 0 at the first step.

def preference(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor,
               beta: float = 0.1) -> torch.Tensor:
    """DPO: -log sigmoid(beta (r_w - r_l)), with r = log p_S(y|x) - log p_T(y|x). Paper eq. 8.

    log 2 when the policy is the reference. beta is not in the paper; 0.1 is the default of its code.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * margin.float())


def ipo(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor,
        beta: float = 0.1) -> torch.Tensor:
    """IPO: (r_w - r_l - 1/(2 beta))^2, a margin to reach rather than to grow for ever (arXiv 2310.12036, eq. 17)."""
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (margin.float() - 1 / (2 * beta)) ** 2


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor,
          beta: float = 0.1) -> torch.Tensor:
    """Hinge: max(0, 1 - beta (r_w - r_l)) (SLiC, arXiv 2305.10425)."""
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return F.relu(1 - beta * margin.float())


def kto_pair(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor,
             beta: float = 0.1) -> torch.Tensor:
    """Paired KTO: the mean of 1 - sigmoid(beta (r_w - K_l)) and 1 - sigmoid(beta (K_w - r_l)) (arXiv 2402.01306).

    K = max(0, mean r) over the pairs given together estimates a KL; it is a yardstick, so no gradient flows through it.
    This is what the released script runs (at one pair a time, where that estimate means little, and with the gradient);
    the paper's eq. 8 is `preference`. Because of K the value depends on which pairs share a micro-batch.
    """
    r_chosen, r_rejected = (chosen - ref_chosen).float(), (rejected - ref_rejected).float()
    k_chosen, k_rejected = r_chosen.detach().mean().clamp(min=0), r_rejected.detach().mean().clamp(min=0)
    return (1 - torch.sigmoid(beta * (r_chosen - k_rejected)) + 1 - torch.sigmoid(beta * (k_chosen - r_rejected))) / 2


PREFERENCES = {"sigmoid": preference, "ipo": ipo, "hinge": hinge, "kto_pair": kto_pair}   # values of `preference_loss`
