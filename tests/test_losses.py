"""
Every loss against a slow loop written from its equation, in fp64, and against values worked by hand.

    python -m pytest tests/test_losses.py
"""
import math

import pytest
import torch
import torch.nn.functional as F

from engine import chunked
from engine.chunked import chunked_loss
from losses import (TOKEN_LOSSES, TeacherReference, affinity_mse, cached_distillation, cross_entropy, distillation, dpo,
                    forward_kl, hidden_mse, hinge, ipo, jsd, kto_pair, merge_tail, mse_standardized, relation_cosine,
                    reverse_kl, standardize)


def softmax(row):
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


def test_cross_entropy_against_a_loop():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 7) * 3, torch.randint(7, (5,))
    expected = [-math.log(softmax(row)[t]) for row, t in zip(logits.tolist(), targets.tolist())]
    torch.testing.assert_close(cross_entropy(logits, targets), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_forward_kl_against_a_loop():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7) * 3, torch.randn(5, 7) * 3
    expected = []
    for s, t in zip(student.tolist(), teacher.tolist()):
        p_s, p_t = softmax(s), softmax(t)
        expected.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p_t, p_s)))
    torch.testing.assert_close(forward_kl(student, teacher), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_forward_kl_worked_by_hand_shows_its_direction():
    """p_T = (1/2, 1/2), p_S = (1/4, 3/4): KL(T||S) = ½ ln 2 + ½ ln(2/3) = 0.14384; the reverse would be 0.13081."""
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    assert forward_kl(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)


def test_forward_kl_is_zero_for_equal_logits_also_shifted_ones():
    logits = torch.randn(4, 9) * 5
    torch.testing.assert_close(forward_kl(logits, logits), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(forward_kl(logits, logits + 3.0), torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("student_width, teacher_width", [(7, 9), (9, 7)])
def test_forward_kl_uses_the_rows_that_both_vocabularies_share(student_width, teacher_width):
    student, teacher = torch.randn(3, student_width), torch.randn(3, teacher_width)
    expected = forward_kl(student[:, :7], teacher[:, :7])
    torch.testing.assert_close(forward_kl(student, teacher), expected, atol=0, rtol=0)


def test_forward_kl_gradient_is_the_difference_of_probabilities():
    student, teacher = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    forward_kl(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, student.softmax(-1).detach() - teacher.softmax(-1), atol=1e-6, rtol=1e-5)


def test_bf16_logits_are_worked_in_fp32():
    student, teacher = torch.randn(4, 1000).bfloat16(), torch.randn(4, 1000).bfloat16()
    kl = forward_kl(student, teacher)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, forward_kl(student.float(), teacher.float()), atol=0, rtol=0)


def test_impossible_tokens_give_no_nan():
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    teacher[:, 0] = -1e9
    kl = forward_kl(student, teacher)
    assert torch.isfinite(kl).all()


# -----------------------------------------------------------------------------
# The whole family, as loops over the vocabulary in fp64, gradients included

def loop_softmax(row):
    e = [torch.exp(v - row.max().detach()) for v in row]
    return [v / sum(e) for v in e]


def loop_forward(s, t):
    return sum(p_t * (torch.log(p_t) - torch.log(p_s)) for p_s, p_t in zip(loop_softmax(s), loop_softmax(t)))


def loop_reverse(s, t):
    return sum(p_s * (torch.log(p_s) - torch.log(p_t)) for p_s, p_t in zip(loop_softmax(s), loop_softmax(t)))


def loop_jsd(s, t, beta=0.5):
    total = 0
    for p_s, p_t in zip(loop_softmax(s), loop_softmax(t)):
        m = beta * p_t + (1 - beta) * p_s
        total = total + beta * p_t * torch.log(p_t / m) + (1 - beta) * p_s * torch.log(p_s / m)
    return total


def loop_z(row):
    mean = sum(row) / len(row)
    variance = sum((v - mean) ** 2 for v in row) / len(row)
    return [(v - mean) / torch.sqrt(variance + 1e-7) for v in row]


def loop_mse(s, t):
    return sum((a - b) ** 2 for a, b in zip(loop_z(s), loop_z(t))) / len(s)


LOOPS = {"forward": loop_forward, "reverse": loop_reverse, "jsd": loop_jsd, "mse": loop_mse}


def assert_same_value_and_gradient(fast, slow, *inputs):
    """1e-10 in fp64: the values, and the gradient of a weighted sum of them with respect to each input."""
    values, expected = fast(), slow()
    torch.testing.assert_close(values, expected, atol=1e-10, rtol=1e-10)
    weights = torch.arange(1, len(values) + 1).double()
    for a, b in zip(torch.autograd.grad((weights * values).sum(), inputs), torch.autograd.grad((weights * expected).sum(), inputs)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", LOOPS)
def test_token_losses_against_loops(name):
    student, teacher = (torch.randn(5, 7).double() * 3 for _ in range(2))
    student.requires_grad_()
    wider = torch.cat([teacher, torch.randn(5, 2).double()], dim=1)              # padding rows of the teacher's head
    slow = lambda: torch.stack([LOOPS[name](s, t) for s, t in zip(student, teacher)])
    assert TOKEN_LOSSES.keys() == LOOPS.keys()
    assert_same_value_and_gradient(lambda: TOKEN_LOSSES[name](student, teacher), slow, student)
    assert_same_value_and_gradient(lambda: TOKEN_LOSSES[name](student, wider), slow, student)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_against_a_loop_for_other_betas(beta):
    student, teacher = (torch.randn(4, 6).double() * 2 for _ in range(2))
    student.requires_grad_()
    slow = lambda: torch.stack([loop_jsd(s, t, beta) for s, t in zip(student, teacher)])
    assert_same_value_and_gradient(lambda: jsd(student, teacher, beta), slow, student)


def test_jsd_meets_the_forward_and_the_reverse_kl_in_its_limits():
    student, teacher = (torch.randn(4, 6).double() for _ in range(2))
    torch.testing.assert_close(jsd(student, teacher, 1e-6) / 1e-6, forward_kl(student, teacher), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(jsd(student, teacher, 1 - 1e-6) / 1e-6, reverse_kl(student, teacher), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(jsd(student, teacher), jsd(teacher, student))     # symmetric at one half


def test_reverse_kl_worked_by_hand():
    """p_T = (1/2, 1/2), p_S = (1/4, 3/4): ¼ ln ½ + ¾ ln 3/2 = 0.13081."""
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    assert reverse_kl(student, teacher).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)


@pytest.mark.parametrize("name", LOOPS)
def test_token_losses_are_zero_for_equal_logits_and_finite_for_impossible_tokens(name):
    logits = torch.randn(4, 9) * 5
    torch.testing.assert_close(TOKEN_LOSSES[name](logits, logits), torch.zeros(4), atol=1e-6, rtol=0)
    student, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    teacher[:, 0] = -1e9
    TOKEN_LOSSES[name](student, teacher).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_standardize_ignores_scale_and_offset_and_mse_too():
    logits, teacher = torch.randn(3, 50).double(), torch.randn(3, 50).double()
    z = standardize(logits)
    torch.testing.assert_close(z.mean(-1), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.var(-1, unbiased=False), torch.ones(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(mse_standardized(3 * logits + 2, teacher), mse_standardized(logits, teacher), atol=1e-6, rtol=0)


def top_k_of(teacher, k):
    """The teacher's k most probable tokens and the log of the rest, as the cache keeps them."""
    top, ids = teacher.softmax(-1).topk(k, dim=-1)
    tail = (1 - top.sum(-1)).clamp(min=0)
    return ids, top.log(), tail.log()


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_top_k_forms_are_the_losses_of_the_merged_distributions(name, k):
    student, teacher = (torch.randn(5, 9).double() for _ in range(2))
    student.requires_grad_()
    ids, top, tail = top_k_of(teacher, k)

    def slow():                                                      # k + 1 outcomes, written out
        values = []
        for n in range(5):
            p = student[n].softmax(-1)
            merged = [p[ids[n, j]] for j in range(k)]
            merged.append(1 - sum(merged))
            values.append(LOOPS[name](torch.stack(merged).log(), torch.cat([top[n], tail[n, None]])))
        return torch.stack(values)

    assert_same_value_and_gradient(lambda: TOKEN_LOSSES[name](*merge_tail(student, ids, top, tail)), slow, student)
    if name != "mse":                                                # merging loses information: a lower bound
        assert (slow() <= TOKEN_LOSSES[name](student, teacher) + 1e-12).all()


@pytest.mark.parametrize("name", LOOPS)
def test_top_k_forms_equal_the_full_loss_at_k_v(name):
    student, teacher = (torch.randn(5, 9).double() for _ in range(2))
    student.requires_grad_()
    merged = merge_tail(student, *top_k_of(teacher, 9))
    assert_same_value_and_gradient(lambda: TOKEN_LOSSES[name](*merged), lambda: TOKEN_LOSSES[name](student, teacher), student)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_top_k_forms_are_finite_when_the_student_leaves_nothing_to_the_tail(name):
    student = torch.tensor([[100.0, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = TOKEN_LOSSES[name](*merge_tail(student, torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log()))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()


def test_reverse_kl_from_a_cache_has_no_exit_through_the_tail():
    """A student that flees to tokens which the teacher finds impossible pays for it; renormalized to the top k it would not."""
    teacher = torch.tensor([[4.0, 3.0, -8.0, -8.0]])
    ids, top, tail = top_k_of(teacher, 2)
    stays, flees = torch.tensor([[4.0, 3.0, -8.0, -8.0]]), torch.tensor([[4.0, 3.0, 12.0, -8.0]])
    renormalized = lambda logits: reverse_kl(logits[:, :2], teacher[:, :2]).item()
    assert renormalized(flees) == pytest.approx(renormalized(stays), abs=1e-6)   # the exit
    merged = lambda logits: reverse_kl(*merge_tail(logits, ids, top, tail)).item()
    assert merged(stays) == pytest.approx(0, abs=1e-5) and merged(flees) > 9
    pulled = flees.clone().requires_grad_()
    reverse_kl(*merge_tail(pulled, ids, top, tail)).sum().backward()
    assert pulled.grad[0, 2] > 0                                     # a descent step takes mass out of the tail


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("temperature, z_scores", [(1.0, False), (2.0, False), (0.5, True)])
def test_distillation_softens_both_sides_and_keeps_the_gradients_size(name, temperature, z_scores):
    """loss(logits / T) T², after z-scores where asked for; from the teacher's logits, or its top k."""
    student, padded = torch.randn(5, 9).double().requires_grad_(), torch.randn(5, 11).double()
    teacher = padded[:, :9]
    soft = lambda row: torch.stack(loop_z(row)) / temperature if z_scores else row / temperature
    slow = lambda: torch.stack([temperature ** 2 * LOOPS[name](soft(s), soft(t)) for s, t in zip(student, teacher)])[1:4]
    settings = dict(kd_loss=name, temperature=temperature, z_scores=z_scores)
    assert_same_value_and_gradient(lambda: distillation(student[1:4], padded[1:4], **settings), slow, student)
    if name != "mse":                                                # V = 9 tokens: nothing is cut off
        ids, top, tail = top_k_of(torch.stack([soft(row) for row in teacher]), 9)
        cached = TeacherReference(top_ids=ids, top_logprobs=top, tail_logprob=tail, vocab_size=9)
        assert_same_value_and_gradient(lambda: cached_distillation(student[1:4], cached, slice(1, 4), **settings), slow, student)


# -----------------------------------------------------------------------------
# Between hidden states, on full tensors. Row 0: two images and padding. Row 1: no image. Row 2: no response.

IMAGE = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
RESPONSE = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]).bool()


def states():
    """Teacher and student of other widths."""
    return torch.randn(3, 8, 5).double().requires_grad_(), torch.randn(3, 8, 7).double()


def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def test_hidden_mse_against_a_loop():
    mapped, teacher = torch.randn(4, 7).double().requires_grad_(), torch.randn(4, 7).double()
    slow = lambda: torch.stack([sum((mapped[n, d] - teacher[n, d]) ** 2 for d in range(7)) / 7 for n in range(4)])
    assert_same_value_and_gradient(lambda: hidden_mse(mapped, teacher), slow, mapped)


def test_affinity_against_a_loop():
    student, teacher = states()

    def slow():
        values = [student.sum() * 0] * 3
        gaps = [(cosine(student[0, i], student[0, r]) - cosine(teacher[0, i], teacher[0, r])) ** 2
                for i in range(8) if IMAGE[0, i] for r in range(8) if RESPONSE[0, r]]
        values[0] = sum(gaps) / len(gaps)
        return torch.stack(values)

    assert_same_value_and_gradient(lambda: affinity_mse(student, teacher, IMAGE, RESPONSE), slow, student)
    torch.testing.assert_close(affinity_mse(teacher * 3, teacher, IMAGE, RESPONSE), torch.zeros(3).double())


def test_relation_against_a_loop():
    student, teacher = states()

    def slow():
        values = [student.sum() * 0] * 3
        for row in (0, 2):
            at = [i for i in range(8) if IMAGE[row, i]]
            ours = torch.stack([cosine(student[row, i], student[row, j]) for i in at for j in at])
            theirs = torch.stack([cosine(teacher[row, i], teacher[row, j]) for i in at for j in at])
            values[row] = 1 - cosine(ours, theirs)
        return torch.stack(values)

    assert_same_value_and_gradient(lambda: relation_cosine(student, teacher, IMAGE), slow, student)


def test_cosines_stay_in_fp32_under_autocast():
    """1 - cosine of two similar matrices is small: in bf16 it would be a multiple of 1/256."""
    states, other = torch.randn(2, 30, 64), torch.randn(2, 30, 96)
    image = torch.arange(30)[None] < torch.tensor([[20], [10]])
    for values in (lambda: relation_cosine(states, other, image), lambda: affinity_mse(states, other, image, ~image)):
        plain = values()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(values(), plain) and plain.dtype == torch.float32


# -----------------------------------------------------------------------------
# By chunks: the definition is the same loss on all logits at once, in fp64

def objectives(targets, teacher_hidden, teacher_weight):
    """Every loss that train.py minimizes, as `chunked_loss` takes it. The teacher's vocabulary is wider by padding."""
    def ce(logits, part):
        each = cross_entropy(logits, targets[part])
        return each, {"ce": each}

    def kl(logits, part):
        each = forward_kl(logits, F.linear(teacher_hidden[part], teacher_weight))
        return each, {"kd": each}

    def both(logits, part):
        a, b = ce(logits, part)[0], kl(logits, part)[0]
        return 0.3 * a + 0.7 * b, {"ce": a, "kd": b}

    def logprob(logits, part):
        each = -cross_entropy(logits, targets[part])
        return each, {"logprob": each}

    def distil(name):
        def loss(logits, part, teacher_logits):
            each = distillation(logits, teacher_logits, name, 1.5)
            return each, {"kd": each}
        return loss

    def from_cache(name):
        ids, top, tail = top_k_of(F.linear(teacher_hidden, teacher_weight)[:, :17], 6)
        reference = TeacherReference(top_ids=ids, top_logprobs=top, tail_logprob=tail, vocab_size=17)

        def loss(logits, part):
            each = cached_distillation(logits, reference, part, name)
            return each, {"kd": each}
        return loss

    losses = {"ce": ce, "kl": kl, "both": both, "logprob": logprob}
    if teacher_hidden is not None and len(teacher_hidden) == 10:
        losses |= {name: distil(name) for name in LOOPS} | {f"cached {name}": from_cache(name) for name in LOOPS}
    return losses


@pytest.mark.parametrize("name", ["ce", "kl", "both", "logprob", *LOOPS, *(f"cached {name}" for name in LOOPS)])
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("trained", [True, False])
def test_chunks_equal_the_plain_formula(name, chunk, trained, monkeypatch):
    """Values, terms and both gradients, 1e-12, with the head tied to the embedding that made the hidden states."""
    monkeypatch.setattr(chunked, "ROWS", {"cpu": 5})
    N, D, V = 10, 6, 17
    embedding = torch.randn(V, D).double().requires_grad_(trained)
    ids, targets = torch.randint(V, (N,)), torch.randint(V, (N,))
    mix = torch.randn(N, N).double().requires_grad_()                # so that something upstream gets a gradient
    teacher = TeacherReference(hidden=torch.randn(N, 4).double(), head=torch.randn(V + 3, 4).double())
    loss = objectives(targets, teacher.hidden, teacher.head)[name]
    given = [teacher] if name in LOOPS else []                       # these get the teacher's logits from chunked_loss

    def run(by):
        hidden = mix @ embedding[ids]
        values, terms = by(hidden, embedding)
        grads = torch.autograd.grad(2.5 * values.sum(), [mix] + [embedding] * trained)
        return values, terms, *grads

    teacher_logits = [F.linear(each.hidden, each.head) for each in given]
    plain = run(lambda hidden, weight: loss(F.linear(hidden, weight), slice(0, N), *teacher_logits))
    by_chunks = run(lambda hidden, weight: chunked_loss(hidden, weight, loss, chunk, *given))
    tolerance = 1e-8 if name.startswith("cached") else 1e-12         # log(1 - mass of the top k) magnifies rounding
    for a, b in zip(by_chunks, plain, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)      # the parts by name, too


def test_chunks_with_a_frozen_head_may_weigh_tokens_as_they_like():
    """As preferences do: the weight of a token is known only after all log-probs are."""
    hidden, weight, targets = torch.randn(7, 4).double().requires_grad_(), torch.randn(9, 4).double(), torch.randint(9, (7,))
    loss = objectives(targets, None, None)["logprob"]
    by = lambda values: dpo(values[:3].sum()[None], values[3:].sum()[None], torch.zeros(1), torch.zeros(1)).sum()
    plain, = torch.autograd.grad(by(loss(F.linear(hidden, weight), slice(0, 7))[0]), hidden)
    by_chunks, = torch.autograd.grad(by(chunked_loss(hidden, weight, loss, 2)[0]), hidden)
    torch.testing.assert_close(by_chunks, plain, atol=1e-7, rtol=0)     # dpo itself is fp32


def test_chunks_with_a_trained_head_refuse_unequal_weights():
    hidden, weight, targets = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True), torch.randint(5, (4,))
    values, _ = chunked_loss(hidden, weight, objectives(targets, None, None)["ce"])
    with pytest.raises(ValueError, match="plain sum"):
        (values * torch.arange(4.0)).sum().backward()


@pytest.mark.parametrize("rows", [16, 2048])
def test_chunks_in_bf16_equal_the_plain_formula_in_bf16(rows, monkeypatch):
    """Under autocast with an trainable fp32 head, as in training; the head's gradient is even summed in higher precision."""
    monkeypatch.setattr(chunked, "ROWS", {"cpu": rows})
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    loss = objectives(torch.randint(40, (8,)), None, None)["ce"]
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss(F.linear(hidden, weight), slice(0, 8))[0]
        by_chunks, _ = chunked_loss(hidden, weight, loss, 3)
    torch.testing.assert_close(by_chunks, plain, atol=0, rtol=0)
    for a, b in zip(torch.autograd.grad(by_chunks.sum(), (hidden, weight)), torch.autograd.grad(plain.sum(), (hidden, weight))):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("trained", [True, False])
def test_chunks_never_hold_the_logits_of_all_tokens(trained, monkeypatch):
    """The largest tensor made, forward and backward, is the head's gradient, or the logits of one product."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 1000:
                self.rows = max(self.rows, out.shape[0])
            return out

    monkeypatch.setattr(chunked, "ROWS", {"cpu": 300})
    hidden, weight = torch.randn(64, 3, requires_grad=True), torch.randn(1000, 3, requires_grad=trained)
    teacher = TeacherReference(hidden=torch.randn(64, 3), head=torch.randn(1000, 3))

    def loss(logits, part, teacher_logits):
        each = distillation(logits, teacher_logits)
        return each, {"kd": each}

    with Largest() as largest:
        chunked_loss(hidden, weight, loss, 2, teacher)[0].sum().backward()
    assert largest.rows == 2 * chunked.PER_PRODUCT["cpu"] < len(hidden)


# -----------------------------------------------------------------------------
# Preferences: r_w = -10 - -12 = 2, r_l = -20 - -17 = -3, margin 5, beta 0.1

PAIR = [torch.tensor([v]) for v in (-10.0, -20.0, -12.0, -17.0)]


def test_dpo_worked_by_hand():
    assert dpo(*PAIR, beta=0.1).item() == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-6)


def test_dpo_is_log_2_when_policy_is_reference_and_falls_with_the_margin():
    chosen, rejected = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(dpo(chosen, rejected, chosen, rejected), torch.full((5,), math.log(2)))
    assert dpo(chosen + 1, rejected, chosen, rejected).max() < math.log(2)


def test_dpo_gradient_pushes_chosen_up_and_rejected_down():
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.05) and rejected.grad.item() == pytest.approx(0.05)


def test_ipo_and_hinge_worked_by_hand():
    assert ipo(*PAIR, beta=0.1).item() == pytest.approx((5 - 5) ** 2)
    assert ipo(*PAIR, beta=0.5).item() == pytest.approx((5 - 1) ** 2)
    assert hinge(*PAIR, beta=0.1).item() == pytest.approx(0.5)
    assert hinge(*PAIR, beta=1.0).item() == 0.0


def test_without_gradients_a_trainable_head_costs_none(monkeypatch):
    """As in validation: the same values, and none of the products of the backward pass."""
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 4), torch.nn.Parameter(torch.randn(7, 4))
    loss = lambda logits, chunk: (logits.logsumexp(-1), {"x": logits[:, 0]})      # noqa: E731
    values, parts = chunked_loss(hidden, head, loss, chunk=2)
    assert values.requires_grad
    for name in ("head_backward", "accumulate_head_grad"):
        monkeypatch.setattr(f"engine.chunked.{name}", lambda *_: pytest.fail("a product for a gradient"))
    with torch.no_grad():
        again, same = chunked_loss(hidden.requires_grad_(), head, loss, chunk=2)
    assert torch.equal(values, again) and torch.equal(parts["x"], same["x"])


def test_kto_pair_worked_by_hand():
    """Two pairs: r_w = (2, -1), r_l = (-3, 1); K_w = max(0, 0.5) = 0.5, K_l = max(0, -1) = 0."""
    chosen, rejected = torch.tensor([2.0, -1.0], requires_grad=True), torch.tensor([-3.0, 1.0])
    zero = torch.zeros(2)
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    expected = [(1 - sigmoid(0.1 * w) + 1 - sigmoid(0.1 * (0.5 - l))) / 2 for w, l in [(2, -3), (-1, 1)]]
    loss = kto_pair(chosen, rejected, zero, zero, beta=0.1)
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=0)
    loss[0].backward()
    assert chosen.grad[1] == 0, "the KL estimate is a yardstick: no gradient from one pair to another"
