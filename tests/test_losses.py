"""
Every loss against a slow loop written from its equation, in fp64, and against values worked by hand.

    python -m pytest tests/test_losses.py
"""
import math

import pytest
import torch

from losses import cross_entropy, distillation, forward_kl, hinge, ipo, kto_pair, preference


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


def test_distillation_terms():
    student, teacher, targets = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    response = torch.tensor([False, True, True, False])
    kl, ce = distillation(student, teacher, targets, response)
    torch.testing.assert_close(kl, forward_kl(student, teacher))
    torch.testing.assert_close(ce, torch.where(response, cross_entropy(student, targets), torch.zeros(4)))


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
