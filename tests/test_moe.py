"""
moe.py against slow loops written from the equations, and hand-worked balance losses.

    python -m pytest tests/test_moe.py
"""
import pytest
import torch

from configurator import UserError
from model import FFN, Llava, flat
from moe import Routing, SparseFFN, balance_loss, expert_counts, sparse_layers, upcycle


def make_layer(top_k=2, norm_topk=True, n_expert=4, seed=0):
    torch.manual_seed(seed)
    return SparseFFN([FFN(16, 24) for _ in range(n_expert)], 16, top_k, norm_topk)


@pytest.mark.parametrize("top_k, norm_topk", [(1, True), (1, False), (2, True), (2, False), (3, True), (4, False)])
def test_sparse_equals_run_every_expert_weight_and_sum(top_k, norm_topk):
    layer = make_layer(top_k, norm_topk)
    x = torch.randn(2, 7, 16)
    y, _ = layer(x)
    for b in range(2):
        for t in range(7):
            probs = torch.softmax(layer.router.weight @ x[b, t], dim=0)
            kept = sorted(range(4), key=lambda e: -probs[e])[:top_k]
            scale = sum(probs[e] for e in kept) if norm_topk else 1.0
            expected = sum(probs[e] / scale * layer.experts[e](x[b, t]) for e in kept)
            torch.testing.assert_close(y[b, t], expected, atol=1e-6, rtol=1e-5)


def balance(routing, valid):
    """Of a batch whose tokens are those where `valid` is true."""
    return balance_loss(routing, torch.where(valid)[0], len(valid))


def test_padding_is_neither_routed_nor_counted():
    layer = make_layer()
    x = torch.randn(2, 5, 16)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    y, routing = layer(x, flat(valid))
    assert routing.probs_NE.shape == (8, 4) and (y[0, 3:] == 0).all()
    full, _ = layer(x)
    torch.testing.assert_close(y[valid], full[valid], atol=1e-6, rtol=1e-6)
    x[0, 3:] = 100.0
    again, other = layer(x, flat(valid))
    torch.testing.assert_close(again[valid], y[valid], atol=0, rtol=0)
    torch.testing.assert_close(balance(routing, valid), balance(other, valid), atol=0, rtol=0)


def test_top_1_has_weight_one_and_still_passes_gradient_to_the_router():
    layer = make_layer(top_k=1)
    x = torch.randn(1, 6, 16)
    weight, _ = layer.route(x[0])
    assert (weight == 1).all()
    layer(x)[0].square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_an_expert_without_tokens_has_a_zero_gradient_not_a_missing_one():
    layer = make_layer(top_k=1)
    x = torch.randn(1, 1, 16)                                        # one token: three experts stay idle
    y, routing = layer(x)
    y.sum().backward()
    chosen = int(routing.expert_NA)
    for e, expert in enumerate(layer.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()) == (e == chosen)


def test_routing_stays_in_fp32_under_autocast():
    layer = make_layer()
    x = torch.randn(1, 50, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, routing = layer(x)
    expected = torch.softmax(x[0].float() @ layer.router.weight.T, -1)
    assert routing.probs_NE.dtype == torch.float32
    torch.testing.assert_close(routing.probs_NE, expected, atol=1e-6, rtol=1e-6)


# -----------------------------------------------------------------------------
# Balance

def test_balance_loss_is_1_at_even_routing_and_grows_to_E():
    valid = torch.ones(1, 4, dtype=torch.bool)
    even = Routing(torch.full((4, 4), 0.25), torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]]))
    assert balance(even, valid).tolist() == [1.0]
    one = Routing(torch.tensor([[1.0, 0, 0, 0]] * 4), torch.zeros(4, 1, dtype=torch.long))
    assert balance(one, valid).tolist() == [4.0]


def test_balance_loss_worked_by_hand():
    """Two experts, top-1, two sequences of 3 and 1 tokens.

    Sequence 0: choices 0, 0, 1 -> f = (2/3, 1/3); mean probabilities P = (0.6, 0.4) -> 2 (0.4 + 0.1333) = 1.0667.
    Sequence 1: choice 1 -> f = (0, 1), P = (0.2, 0.8) -> 1.6.
    """
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    routing = Routing(probs, torch.tensor([[0], [0], [1], [1]]))
    valid = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    torch.testing.assert_close(balance(routing, valid), torch.tensor([2 * (2 / 3 * 0.6 + 1 / 3 * 0.4), 1.6]))


def test_balance_loss_does_not_depend_on_other_rows_of_the_batch():
    layer = make_layer()
    x = torch.randn(3, 6, 16)
    valid = torch.arange(6)[None] < torch.tensor([6, 2, 4])[:, None]
    together = balance(layer(x, flat(valid))[1], valid)
    alone = [balance(layer(x[b:b + 1], flat(valid[b:b + 1]))[1], valid[b:b + 1]) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_balance_gradient_goes_to_the_router():
    layer = make_layer()
    x = torch.randn(1, 20, 16)
    valid = torch.ones(1, 20, dtype=torch.bool)
    balance(layer(x)[1], valid).sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_expert_counts_split_by_modality():
    routing = Routing(torch.full((4, 3), 1 / 3), torch.tensor([[0, 1], [0, 2], [1, 2], [1, 0]]))
    valid = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    image = torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()              # tokens 0 and 2 of the four valid ones
    assert expert_counts(routing, image[valid]).tolist() == [[1, 2, 1], [2, 1, 1]]


# -----------------------------------------------------------------------------
# Upcycling

@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("layers", ["even", "all", "second_half", [1]])
def test_upcycled_equals_dense_at_step_0(clip_folder, qwen_folder, top_k, layers):
    llava = Llava.from_parts(clip_folder, qwen_folder)
    ids = torch.randint(4, 36, (2, 11))
    before = llava(ids)
    upcycle(llava, 4, top_k, layers)
    torch.testing.assert_close(llava(ids), before, atol=1e-5, rtol=1e-5)


def test_raw_weights_scale_the_ffn_as_equation_4_says(clip_folder, qwen_folder):
    llava = Llava.from_parts(clip_folder, qwen_folder)
    dense = llava.decoder.blocks[0].ffn
    upcycle(llava, 4, 2, norm_topk=False)
    sparse = llava.decoder.blocks[0].ffn
    x = torch.randn(1, 5, 32)
    y, routing = sparse(x)
    kept = routing.probs_NE.topk(2).values.sum(-1)
    torch.testing.assert_close(y[0], kept[:, None] * dense(x)[0], atol=1e-5, rtol=1e-5)


def test_upcycling_copies_are_independent_and_routers_come_from_the_seed(clip_folder, qwen_folder):
    routers = []
    for seed in (0, 0, 1):
        llava = Llava.from_parts(clip_folder, qwen_folder)
        upcycle(llava, 4, 2, seed=seed)
        routers.append(llava.decoder.blocks[0].ffn.router.weight)
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])
    experts = llava.decoder.blocks[0].ffn.experts
    experts[0].up_proj.weight.data.zero_()
    assert experts[1].up_proj.weight.any()


def test_which_layers():
    assert sparse_layers("even", 5) == [0, 2, 4] and sparse_layers("all", 2) == [0, 1]
    assert sparse_layers("first_half", 5) == [0, 1] and sparse_layers("second_half", 5) == [2, 3, 4]
    assert sparse_layers([3, 1, 3], 5) == [1, 3]
    for wrong in ("odd", [5], [-1], []):
        with pytest.raises(UserError):
            sparse_layers(wrong, 5)


def test_upcycling_refuses_what_makes_no_sense(clip_folder, qwen_folder):
    llava = Llava.from_parts(clip_folder, qwen_folder)
    with pytest.raises(UserError, match="top_k=5"):
        upcycle(llava, 4, 5)
    upcycle(llava, 4, 2)
    with pytest.raises(UserError, match="sparse already"):
        upcycle(llava, 4, 2)
