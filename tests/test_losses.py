"""
Every loss against a slow loop written from its equation, in fp64, and against values worked by hand.

    python -m pytest tests/test_losses.py
"""
import math

import pytest
import torch
import torch.nn.functional as F

import losses
from engine import chunked
from engine.chunked import chunked_loss
from losses import cross_entropy, forward_kl, forward_kl_top_k, hinge, ipo, kto_pair, preference


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


def test_top_k_kl_is_the_kl_of_the_merged_distributions():
    student, teacher = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    p, q = teacher.softmax(-1), student.softmax(-1)
    for k in (1, 3, 8):
        top, ids = p.topk(k, dim=-1)
        tail = 1 - top.sum(-1)
        expected = torch.zeros(5).double()
        for n in range(5):      # k + 1 outcomes, written out
            for j in range(k):
                expected[n] += top[n, j] * (top[n, j] / q[n, ids[n, j]]).log()
            expected[n] += tail[n] * (tail[n] / (1 - q[n, ids[n]].sum())).log()
        torch.testing.assert_close(forward_kl_top_k(student, ids, top.log(), tail.log()), expected, atol=1e-10, rtol=0)
        assert (expected <= forward_kl(student, teacher) + 1e-12).all()      # a lower bound
    top, ids = p.topk(9, dim=-1)
    everything = forward_kl_top_k(student, ids, top.log(), torch.full((5,), -math.inf).double())
    torch.testing.assert_close(everything, forward_kl(student, teacher), atol=1e-10, rtol=0)


def test_top_k_kl_is_finite_when_the_student_leaves_nothing_to_the_tail():
    student = torch.tensor([[100.0, 0.0, 0.0, 0.0]], requires_grad=True)
    kl = forward_kl_top_k(student, torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log())
    kl.sum().backward()
    assert torch.isfinite(kl).all() and torch.isfinite(student.grad).all()


# -----------------------------------------------------------------------------
# By chunks: the definition is the same loss on all logits at once, in fp64

def objectives(targets, teacher_hidden, teacher_weight):
    """Every loss that train.py minimises, as `chunked_loss` takes it. The teacher's vocabulary is wider by padding."""
    def ce(logits, part):
        each = cross_entropy(logits, targets[part])
        return each, [each]

    def kl(logits, part):
        each = forward_kl(logits, F.linear(teacher_hidden[part], teacher_weight))
        return each, [each]

    def both(logits, part):
        a, b = ce(logits, part)[0], kl(logits, part)[0]
        return 0.3 * a + 0.7 * b, [a, b]

    def logprob(logits, part):
        each = -cross_entropy(logits, targets[part])
        return each, [each]
    return {"ce": ce, "kl": kl, "both": both, "logprob": logprob}


@pytest.mark.parametrize("name", ["ce", "kl", "both", "logprob"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("trained", [True, False])
def test_chunks_equal_the_plain_formula(name, chunk, trained, monkeypatch):
    """Values, terms and both gradients, 1e-12, with the head tied to the embedding that made the hidden states."""
    monkeypatch.setattr(losses, "ROWS", {"cpu": 5})
    N, D, V = 10, 6, 17
    embedding = torch.randn(V, D).double().requires_grad_(trained)
    ids, targets = torch.randint(V, (N,)), torch.randint(V, (N,))
    mix = torch.randn(N, N).double().requires_grad_()                # so that something upstream gets a gradient
    loss = objectives(targets, torch.randn(N, 4).double(), torch.randn(V + 3, 4).double())[name]

    def run(by):
        hidden = mix @ embedding[ids]
        values, terms = by(hidden, embedding)
        grads = torch.autograd.grad(2.5 * values.sum(), [mix] + [embedding] * trained)
        return values, terms, *grads

    plain = run(lambda hidden, weight: (lambda out: (out[0], torch.stack(out[1])))(loss(F.linear(hidden, weight), slice(0, N))))
    chunked = run(lambda hidden, weight: chunked_loss(hidden, weight, loss, chunk))
    for a, b in zip(chunked, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_chunks_with_a_frozen_head_may_weigh_tokens_as_they_like():
    """As preferences do: the weight of a token is known only after all log-probs are."""
    hidden, weight, targets = torch.randn(7, 4).double().requires_grad_(), torch.randn(9, 4).double(), torch.randint(9, (7,))
    loss = objectives(targets, None, None)["logprob"]
    by = lambda values: preference(values[:3].sum()[None], values[3:].sum()[None], torch.zeros(1), torch.zeros(1)).sum()
    plain, = torch.autograd.grad(by(loss(F.linear(hidden, weight), slice(0, 7))[0]), hidden)
    chunked, = torch.autograd.grad(by(chunked_loss(hidden, weight, loss, 2)[0]), hidden)
    torch.testing.assert_close(chunked, plain, atol=1e-7, rtol=0)     # the preference itself is fp32


def test_chunks_with_a_trained_head_refuse_unequal_weights():
    hidden, weight, targets = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True), torch.randint(5, (4,))
    values, _ = chunked_loss(hidden, weight, objectives(targets, None, None)["ce"])
    with pytest.raises(ValueError, match="plain sum"):
        (values * torch.arange(4.0)).sum().backward()


@pytest.mark.parametrize("rows", [16, 2048])
def test_chunks_in_bf16_equal_the_plain_formula_in_bf16(rows, monkeypatch):
    """Under autocast with an fp32 head that learns, as in training; a head's gradient is even summed in more precision."""
    monkeypatch.setattr(losses, "ROWS", {"cpu": rows})
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    loss = objectives(torch.randint(40, (8,)), None, None)["ce"]
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss(F.linear(hidden, weight), slice(0, 8))[0]
        chunked, _ = chunked_loss(hidden, weight, loss, 3)
    torch.testing.assert_close(chunked, plain, atol=0, rtol=0)
    for a, b in zip(torch.autograd.grad(chunked.sum(), (hidden, weight)), torch.autograd.grad(plain.sum(), (hidden, weight))):
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

    monkeypatch.setattr(losses, "ROWS", {"cpu": 300})
    hidden, weight = torch.randn(64, 3, requires_grad=True), torch.randn(1000, 3, requires_grad=trained)
    loss = objectives(torch.randint(1000, (64,)), torch.randn(64, 3), torch.randn(1000, 3))["both"]
    with Largest() as largest:
        chunked_loss(hidden, weight, loss, 4)[0].sum().backward()
    assert largest.rows == 4 * chunked.PER_PRODUCT < len(hidden)


# -----------------------------------------------------------------------------
# Preferences: r_w = -10 - -12 = 2, r_l = -20 - -17 = -3, margin 5, beta 0.1

PAIR = [torch.tensor([v]) for v in (-10.0, -20.0, -12.0, -17.0)]


def test_preference_worked_by_hand():
    assert preference(*PAIR, beta=0.1).item() == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-6)


def test_preference_is_log_2_when_policy_is_reference_and_falls_with_the_margin():
    chosen, rejected = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(preference(chosen, rejected, chosen, rejected), torch.full((5,), math.log(2)))
    assert preference(chosen + 1, rejected, chosen, rejected).max() < math.log(2)


def test_preference_gradient_pushes_chosen_up_and_rejected_down():
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    preference(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.05) and rejected.grad.item() == pytest.approx(0.05)


def test_ipo_and_hinge_worked_by_hand():
    assert ipo(*PAIR, beta=0.1).item() == pytest.approx((5 - 5) ** 2)
    assert ipo(*PAIR, beta=0.5).item() == pytest.approx((5 - 1) ** 2)
    assert hinge(*PAIR, beta=0.1).item() == pytest.approx(0.5)
    assert hinge(*PAIR, beta=1.0).item() == 0.0


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
