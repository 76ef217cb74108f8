"""
What stays exact in a bf16 run: the routers (their products, their gradients, their exported weights) and the log-probs
of answers in pd.

    python -m pytest tests/test_precision.py
"""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from configurator import UserError
from engine import distributed
from model import Llava, flat
from pretend_cuda import pretend_cuda
from test_train import flags


def test_a_routers_gradient_is_computed_in_fp32(world, tmp_path, monkeypatch):
    """Against X^T G in fp64, from the router's inputs X and the gradient G of its outputs. In bf16 it is off by 2e-3."""
    linear, seen, gradients = F.linear, [], []

    def watched(x, weight, bias=None):
        logits = linear(x, weight, bias)
        if weight.shape == (4, 32) and logits.requires_grad:         # a router: 4 experts, width 32
            logits.register_hook(lambda grad: seen.append((x.detach().double(), grad.double())))
        return logits

    run = train.setup(train.configure(flags(world, "d2s", tmp_path, dtype="bfloat16")), distributed.init_distributed("cpu"))
    routers = [p for name, p in run.trainable.items() if ".router." in name]
    run.optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.double() for p in routers))
    micro_batches = next(run.batches)
    total = train.count_batch(micro_batches, run.config)
    monkeypatch.setattr(F, "linear", watched)
    train.train_step(run, micro_batches, total, lr=1e-3)
    assert len(seen) == len(gradients) == 2
    for gradient, (x, grad) in zip(gradients, reversed(seen)):       # the backward comes to the last layer first
        torch.testing.assert_close(gradient, grad.T @ x, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_the_log_prob_of_an_answer_is_that_of_fp32_logits():
    """40 tokens out of 20,000, against fp64 on the same bf16 states and head. With bf16 logits it is off by 0.1."""
    torch.manual_seed(0)
    head, states = torch.randn(20_000, 64).bfloat16(), torch.randn(4, 50, 64).bfloat16()
    ids, response = torch.randint(0, 20_000, (4, 50)), torch.zeros(4, 50, dtype=torch.bool)
    response[:, 9:49] = True
    llava = SimpleNamespace(decoder=SimpleNamespace(head_weight=head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = {"head": flat(response), "targets": ids[:, 10:50].flatten()}
        found = train.sequence_logprobs(llava, states, batch)
    logprobs = (states.double() @ head.double().T).log_softmax(-1)
    expected = logprobs[:, 9:49].gather(2, ids[:, 10:50, None]).sum((1, 2))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)
    rounded = (states @ head.T).double().log_softmax(-1)[:, 9:49].gather(2, ids[:, 10:50, None]).sum((1, 2))
    assert (rounded - expected).abs().max() > 0.05


def test_routers_are_exported_and_opened_in_fp32(world, tmp_path):
    train.main(flags(world, "d2s", tmp_path, max_steps=1, dtype="bfloat16"))
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for key, tensor in stored.items() if not key.endswith(".mlp.gate.weight")} == {torch.bfloat16}
    state = torch.load(tmp_path / "state" / "step_00000001.pt", weights_only=True)["weights"]
    opened = Llava.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for i in (0, 2):                                                 # the sparse layers
        router = opened.decoder.blocks[i].ffn.router.weight
        assert router.dtype == torch.float32
        assert torch.equal(router, state[f"student.decoder.blocks.{i}.ffn.router.weight"])
        assert torch.equal(router, stored[f"language_model.model.layers.{i}.mlp.gate.weight"])


@pytest.mark.parametrize("dtype, precision", [("float32", "high"), ("bfloat16", "highest")])
def test_tf32_is_for_runs_in_fp32_only(world, tmp_path, dtype, precision):
    with pretend_cuda() as gpu:
        train.main(flags(world, "d2s", tmp_path, max_steps=1, dtype=dtype, device="cuda", batch_size=2, micro_batch_size=2))
    assert gpu.matmul_precision == precision and not torch.are_deterministic_algorithms_enabled()


def test_deterministic_runs_ask_torch_for_it(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with pretend_cuda():
        train.main(flags(world, "align", tmp_path, max_steps=1, deterministic=True, device="cuda", batch_size=2, micro_batch_size=2))
    assert asked == [True]
    with pytest.raises(UserError, match="deterministic and on_policy: torch has no deterministic cumulative sum"):
        train.configure(flags(world, "d2d", tmp_path, deterministic=True, on_policy=0.5))
