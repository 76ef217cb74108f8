"""
Every training objective, as pure functions of tensors.

    per token            cross_entropy                        the data's next token                  eq. 5, eq. 7
                         forward_kl, reverse_kl, jsd, mse     the teacher's next-token distribution  eq. 6, eq. 7; LLaVADI
    per hidden state     hidden_mse                           the teacher's last hidden state        LLaVADI
    per row              affinity_mse, relation_cosine        how positions relate to each other     LLaVADI; LLaVA-KD
    per pair             dpo, ipo, hinge, kto_pair            the better answer over the worse one   eq. 8

Inputs are already shifted: row n of the logits predicts the n-th token in question, that is, the logits at position t go
with the token at t+1. The caller shifts once, for every loss alike (the released code shifts its cross-entropy and its
DPO but not its distillation mask, and so distills one position late).

Nothing here is reduced: token losses return one value per token (N,), others one per row or pair (B,). The caller
sums them and divides by the number of response tokens, or of pairs, in the *global* batch, over all micro-batches and
ranks. A mean of means would be another objective whenever lengths differ.

Everything is computed in log space, and in fp32 whatever dtype the logits have. S is the student (the policy), T the
teacher (the reference model). Shapes: N tokens, V vocabulary, B pairs, k of the teacher's most probable tokens.
"""
import math
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
    log_p_student, log_p_teacher = log_probs(student_logits, teacher_logits)
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(p_S || p_T): (N, V), (N, V') -> (N,). The expectation is over the student (MiniLLM, arXiv 2306.08543).

    Mode-seeking: the student may ignore what the teacher finds possible, but not invent what it finds impossible.
    """
    log_p_student, log_p_teacher = log_probs(student_logits, teacher_logits)
    return F.kl_div(log_p_teacher, log_p_student, reduction="none", log_target=True).sum(-1)


def jsd(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """beta KL(p_T || M) + (1 - beta) KL(p_S || M), M = beta p_T + (1 - beta) p_S: (N, V), (N, V') -> (N,), 0 < beta < 1.

    Generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649): jsd / beta tends to the forward KL for beta -> 0, and
    jsd / (1 - beta) to the reverse KL for beta -> 1.
    """
    log_p_student, log_p_teacher = log_probs(student_logits, teacher_logits)
    log_m = torch.logaddexp(log_p_teacher + math.log(beta), log_p_student + math.log(1 - beta))
    teacher_to_m = F.kl_div(log_m, log_p_teacher, reduction="none", log_target=True).sum(-1)
    student_to_m = F.kl_div(log_m, log_p_student, reduction="none", log_target=True).sum(-1)
    return beta * teacher_to_m + (1 - beta) * student_to_m


def mse_standardized(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """mean_v (z_S - z_T)^2, with z the logits standardized per token: (N, V), (N, V') -> (N,). LLaVADI's `mse_distill`."""
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return (standardize(student_logits[:, :shared]) - standardize(teacher_logits[:, :shared])).square().mean(-1)


def standardize(logits: torch.Tensor) -> torch.Tensor:
    """z-scores of each token's logits: mean 0 and variance 1 over V, epsilon 1e-7 (LLaVADI's `norm_logits`)."""
    return F.layer_norm(at_least_fp32(logits), logits.shape[-1:], eps=1e-7)


def log_probs(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log_softmax of both over the rows that the two vocabularies share: (N, V), (N, V') -> two of (N, min(V, V'))."""
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return (F.log_softmax(at_least_fp32(student_logits[:, :shared]), dim=-1),
            F.log_softmax(at_least_fp32(teacher_logits[:, :shared]), dim=-1))


TOKEN_LOSSES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jsd, "mse": mse_standardized}   # values of `kd_loss`


# -----------------------------------------------------------------------------
# What a token loss compares the student with

@dataclass
class TeacherReference:
    """The teacher's output for a micro-batch, in one of three forms."""
    states: torch.Tensor | None = None         # (B, T, D') last hidden states
    hidden: torch.Tensor | None = None         # (N, D') those of the N tokens that go through the head, with
    head: torch.Tensor | None = None           # (V', D'): `chunked_loss` makes the logits of a few tokens at a time
    top_ids: torch.Tensor | None = None        # (N, k) from the teacher cache, with
    top_logprobs: torch.Tensor | None = None   # (N, k)
    tail_logprob: torch.Tensor | None = None   # (N,) the log of the probability of all other tokens
    vocab_size: int = 0                        # tokens that the cached distribution is over
    sequence_logprobs: torch.Tensor | None = None   # (2B,) for dpo: all chosen answers, then all rejected ones


def merge_tail(student_logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor,
               tail_logprob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both distributions over k + 1 outcomes, the teacher's k most probable tokens and "any other token":
    (N, V), (N, k), (N, k), (N,) -> student and teacher log-probs (N, k+1), which every token loss takes as logits.

    With k = V there is no other token, and the distributions are the full ones.
    """
    # Merging outcomes can only lose information, so a KL of the merged ones is a lower bound of the true KL: how much mass
    # the student leaves to the tail is trained, how that mass is spread is not. Dropping the tail, or rescaling the k
    # to sum to 1, would be another target: a student could escape the k tokens at no cost.
    log_p_student = F.log_softmax(at_least_fp32(student_logits), dim=-1).gather(1, top_ids)               # (N, k)
    if top_ids.shape[1] == student_logits.shape[1]:
        return log_p_student, top_logprobs
    mass = log_p_student.logsumexp(-1).exp().clamp(max=1 - torch.finfo(log_p_student.dtype).eps)          # (N,)
    return (torch.cat([log_p_student, torch.log1p(-mass)[:, None]], dim=1),
            torch.cat([top_logprobs, tail_logprob[:, None]], dim=1))


def distillation(student_logits: torch.Tensor, teacher_logits: torch.Tensor, kd_loss: str = "forward",
                 temperature: float = 1.0, z_scores: bool = False, jsd_beta: float = 0.5) -> torch.Tensor:
    """The token loss `kd_loss` between student and teacher: (N, V), (N, V') -> (N,).

    Before it, logits may be standardized (z_scores) and divided by the temperature; the loss is then multiplied by
    temperature^2, which keeps its gradient's size (Hinton et al., arXiv 1503.02531).
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (soften(logits[:, :shared], temperature, z_scores) for logits in (student_logits, teacher_logits))
    return temperature ** 2 * token_loss(kd_loss, student, teacher, jsd_beta)


def cached_distillation(student_logits: torch.Tensor, teacher: TeacherReference, chunk: slice, kd_loss: str = "forward",
                        temperature: float = 1.0, z_scores: bool = False, jsd_beta: float = 0.5) -> torch.Tensor:
    """The same from the teacher cache, which holds log-probs of softened logits, for the tokens in `chunk`:
    (n, V) -> (n,)."""
    student, teacher = merge_tail(soften(student_logits[:, :teacher.vocab_size], temperature, z_scores),
                                  teacher.top_ids[chunk].long(), teacher.top_logprobs[chunk], teacher.tail_logprob[chunk])
    return temperature ** 2 * token_loss(kd_loss, student, teacher, jsd_beta)


def token_loss(kd_loss: str, student: torch.Tensor, teacher: torch.Tensor, jsd_beta: float) -> torch.Tensor:
    return jsd(student, teacher, jsd_beta) if kd_loss == "jsd" else TOKEN_LOSSES[kd_loss](student, teacher)


def soften(logits: torch.Tensor, temperature: float, z_scores: bool) -> torch.Tensor:
    logits = standardize(logits) if z_scores else logits
    return logits if temperature == 1 else at_least_fp32(logits) / temperature


# -----------------------------------------------------------------------------
# Between hidden states: what the output head reads, the student's (…, D) and the teacher's (…, D')

def hidden_mse(mapped: torch.Tensor, teacher_hidden: torch.Tensor) -> torch.Tensor:
    """mean over D' of (P(h_S) - h_T)^2: (N, D'), (N, D') -> (N,). LLaVADI's `align_hidden_embeds`.

    P, which maps the student's states to the teacher's width, is trained with the student (`Objective.hidden_map`).
    """
    return (at_least_fp32(mapped) - at_least_fp32(teacher_hidden)).square().mean(-1)


def affinity_mse(student_states: torch.Tensor, teacher_states: torch.Tensor, is_image: torch.Tensor,
                 is_response: torch.Tensor) -> torch.Tensor:
    """Mean over image x response of (A_S - A_T)^2, A = cosines of image and response states; LLaVADI's `align_affinity`:
    (B, T, D), (B, T, D'), (B, T) bool twice -> (B,), 0 for a row that lacks one of the two.

    A has no width, so no map is needed.
    """
    values = []
    for student, teacher, image, response in zip(student_states, teacher_states, is_image, is_response):
        if not image.any() or not response.any():
            values.append(student.float().sum() * 0)                 # 0, with a gradient: DDP waits for every parameter
            continue
        a_student, a_teacher = (cosines(h[image], h[response]) for h in (student, teacher))      # (images, responses)
        values.append((a_student - a_teacher).square().mean())
    return torch.stack(values)


def relation_cosine(student_states: torch.Tensor, teacher_states: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    """1 - cosine between the flattened V V^T of student and teacher, V the normalized image states; LLaVA-KD's RDist:
    (B, T, D), (B, T, D'), (B, T) bool -> (B,), 0 for a row without an image.
    """
    values = []
    for student, teacher, image in zip(student_states, teacher_states, is_image):
        if not image.any():
            values.append(student.float().sum() * 0)
            continue
        grams = [cosines(h[image], h[image]) for h in (student, teacher)]                        # (images, images)
        values.append(1 - F.cosine_similarity(grams[0].flatten(), grams[1].flatten(), dim=0))
    return torch.stack(values)


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Between all rows of a and all rows of b, in fp32 under autocast too: (m, D), (n, D) -> (m, n)."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(at_least_fp32(a), dim=-1) @ F.normalize(at_least_fp32(b), dim=-1).T


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
