"""
Every training objective, as pure functions of tensors.

Three families, in the order of the paper's stages:

    per token   cross_entropy        the data's next token                                  eq. 5, second term of eq. 7
    per token   forward_kl           the teacher's distribution over the next token         eq. 6, first term of eq. 7
    per pair    dpo (ipo, hinge, kto_pair)   the better answer over the worse one, relative to the teacher        eq. 8

Inputs are already shifted: row n of the logits predicts the n-th token in question, that is, the logits at position t go
with the token at t+1. The caller shifts once, for every loss alike (the released code shifts its cross-entropy and its
DPO but not its distillation mask, and so distills one position late).

Nothing here is reduced: token losses return one value per token (N,), preference losses one per pair (B,). The caller
sums them and divides by the number of response tokens, or of pairs, in the *global* batch, over all micro-batches and
ranks. A mean of means would be another objective whenever lengths differ.

Everything is computed in log space, and in fp32 whatever dtype the logits have. S is the student (the policy), T the
teacher (the reference model). Shapes: N tokens, V vocabulary, B pairs, k of the teacher's most probable tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """bf16 -> fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -----------------------------------------------------------------------------
# Per token

def cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p_S(y_n): (N, V), (N,) -> (N,). Paper eq. 5 (initialization) and the second term of eq. 7."""
    return F.cross_entropy(at_least_fp32(student_logits), targets, reduction="none")


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(p_T || p_S) = sum_v p_T(v) (log p_T(v) - log p_S(v)): (N, V), (N, V') -> (N,). Paper eq. 6.

    "Forward": the expectation is over the teacher, so wherever the teacher puts mass the student must too. Temperature is
    1, as in the paper. Widths may differ by padding rows only (Qwen2-7B has 152,064 rows, its small siblings 151,936, of
    one tokenizer): both distributions are taken over the rows that the two share.
    """
    # Eq. 6 is printed as -E[log(p_T/p_S)], which is minus this; text and code mean plus. The released code minimizes the
    # cross-entropy to the teacher, -sum p_T log p_S: the same gradient, but its value never gets near 0. This one does.
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_p_student = F.log_softmax(at_least_fp32(student_logits[:, :shared]), dim=-1)   # (N, V)
    log_p_teacher = F.log_softmax(at_least_fp32(teacher_logits[:, :shared]), dim=-1)   # (N, V)
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)


def forward_kl_top_k(student_logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor,
                     tail_logprob: torch.Tensor) -> torch.Tensor:
    """The same KL from the teacher's k most probable tokens: (N, V), (N, k), (N, k), (N,) -> (N,).

    All other tokens count as one outcome, with probability exp(tail_logprob) for the teacher and 1 - sum_k p_S for the
    student. With k = V there is no tail, and this is `forward_kl`.
    """
    # Merging outcomes can only lose information, so the value is a lower bound of the true KL: the student is trained on
    # how much mass it leaves to the tail, not on how that mass is spread. Dropping the tail, or rescaling the k to sum
    # to 1, would be another target and make the student overconfident.
    log_p_student = F.log_softmax(at_least_fp32(student_logits), dim=-1).gather(1, top_ids)               # (N, k)
    kl = F.kl_div(log_p_student, top_logprobs, reduction="none", log_target=True).sum(-1)
    if top_ids.shape[1] == student_logits.shape[1]:
        return kl
    mass = log_p_student.logsumexp(-1).exp().clamp(max=1 - torch.finfo(log_p_student.dtype).eps)          # (N,)
    return kl + F.kl_div(torch.log1p(-mass), tail_logprob, reduction="none", log_target=True)


# -----------------------------------------------------------------------------
# What a token loss compares the student with

@dataclass
class TeacherReference:
    """The teacher's output for the N tokens of a micro-batch, in one of three forms."""
    hidden: torch.Tensor | None = None         # (N, D') last hidden states, with
    head: torch.Tensor | None = None           # (V', D'): logits are computed for a few tokens at a time, when needed
    top_ids: torch.Tensor | None = None        # (N, k) from the teacher cache, with
    top_logprobs: torch.Tensor | None = None   # (N, k)
    tail_logprob: torch.Tensor | None = None   # (N,)
    vocab_size: int = 0                        # tokens that the cached distribution is over
    sequence_logprobs: torch.Tensor | None = None   # (2B,) for dpo: all chosen answers, then all rejected ones


def distillation(student_logits: torch.Tensor, teacher: TeacherReference, chunk: slice) -> torch.Tensor:
    """The distillation loss of the tokens in `chunk`: (n, V) -> (n,)."""
    if teacher.top_ids is not None:
        return forward_kl_top_k(student_logits[:, :teacher.vocab_size], teacher.top_ids[chunk].long(),
                                teacher.top_logprobs[chunk], teacher.tail_logprob[chunk])
    with torch.no_grad():
        teacher_logits = F.linear(teacher.hidden[chunk], teacher.head)                 # (n, V')
    return forward_kl(student_logits, teacher_logits)


# -----------------------------------------------------------------------------
# Per pair. All take log-probs summed over the response tokens of each answer, (B,) each -> (B,). `chosen` and `rejected`
# are the student's, `ref_chosen` and `ref_rejected` the reference's. The reference of DPO is usually a frozen copy of the
# policy; here it is the teacher, a larger model, so the log-ratios are not 0 at the first step.

def dpo(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor,
        beta: float = 0.1) -> torch.Tensor:
    """-log sigmoid(beta (r_w - r_l)), with r = log p_S(y|x) - log p_T(y|x). Paper eq. 8.

    log 2 when the policy is the reference. beta is not in the paper; 0.1 is the default of its code.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * margin.float())


def ipo(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor,
        beta: float = 0.1) -> torch.Tensor:
    """(r_w - r_l - 1/(2 beta))^2: the margin has a target instead of growing for ever (arXiv 2310.12036, eq. 17)."""
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (margin.float() - 1 / (2 * beta)) ** 2


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor,
          beta: float = 0.1) -> torch.Tensor:
    """max(0, 1 - beta (r_w - r_l)) (SLiC, arXiv 2305.10425)."""
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return F.relu(1 - beta * margin.float())


def kto_pair(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor,
             beta: float = 0.1) -> torch.Tensor:
    """The mean of 1 - sigmoid(beta (r_w - K_l)) and 1 - sigmoid(beta (K_w - r_l)) (arXiv 2402.01306).

    K = max(0, mean r) over the pairs of the micro-batch is a baseline without gradient, an estimate of a KL; so the value
    depends on which pairs share a micro-batch.
    """
    # This is what the released script runs (one pair at a time, where that estimate means little, and with the gradient
    # through K); the paper's eq. 8 is `dpo`, which we follow.
    r_chosen, r_rejected = (chosen - ref_chosen).float(), (rejected - ref_rejected).float()
    k_chosen, k_rejected = r_chosen.detach().mean().clamp(min=0), r_rejected.detach().mean().clamp(min=0)
    return (1 - torch.sigmoid(beta * (r_chosen - k_rejected)) + 1 - torch.sigmoid(beta * (k_chosen - r_rejected))) / 2


PREFERENCE_LOSSES = {"sigmoid": dpo, "ipo": ipo, "hinge": hinge, "kto_pair": kto_pair}   # values of `preference_loss`
