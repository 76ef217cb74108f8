"""
The sparse mixture of experts: one FFN becomes E FFNs and a router that sends every token to A of them.

For a token x (paper, eqs. 2-4), with W_r the router's matrix and E_e the e-th expert:

    r   = softmax(x W_r)                      probability of each expert                 (eq. 3)
    r~  = r on the A largest entries, 0 elsewhere                                        (eq. 4)
    y   = sum_e r~_e E_e(x)                                                              (eq. 2)

By default the A kept weights are divided by their sum. The paper prints eq. 4 without that division, its released code
has it, and we follow the code. Every expert starts as a copy of the same dense FFN (`upcycle`), so with weights that sum
to 1 the sparse model equals its dense origin at step 0. Raw ones would shrink each FFN's output to about A/E of it.
`norm_topk=False` is the paper's equation to the letter.

Left out on purpose: expert capacity (no token is ever dropped), router noise (routing is deterministic), and padding
(neither routed nor counted). The released code has all three, through DeepSpeed.

Names end in the letters of their shape; the key is in model.py. Here N is the number of valid tokens: all but padding.
"""
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from configurator import UserError, require_memory


MAX_EXPERTS = 1000    # of a layer


class Routing(NamedTuple):
    """Where one sparse layer sent its N valid tokens."""
    probs_NE: torch.Tensor    # softmax of the router over all experts, fp32, with gradient
    expert_NA: torch.Tensor   # the chosen experts, most probable first


class SparseFFN(nn.Module):
    """Router and experts in place of one dense FFN.

    `experts` is a list of FFN modules (N, D) -> (N, D); what is inside them does not matter here.
    """

    def __init__(self, experts: list[nn.Module], n_embd: int, top_k: int, norm_topk: bool = True):
        super().__init__()
        assert 1 <= top_k <= len(experts), f"top_k is {top_k}, with {len(experts)} experts"
        self.router = nn.Linear(n_embd, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.top_k = top_k
        self.norm_topk = norm_topk

    def route(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """(N, D) -> the weights of the chosen experts (N, A), and the routing."""
        with torch.autocast(x_ND.device.type, enabled=False):        # in bf16, rounding would reorder close experts
            probs_NE = F.linear(x_ND.float(), self.router.weight.float()).softmax(-1)    # eq. 3
        weight_NA, expert_NA = probs_NE.topk(self.top_k, dim=-1)                         # eq. 4
        if self.norm_topk and self.top_k == 1:
            # Renormalized, a single weight is the constant 1, and the router would get no gradient.
            # r / stop_gradient(r) has the same value and does pass the gradient.
            weight_NA = weight_NA / weight_NA.detach()
        elif self.norm_topk:
            weight_NA = weight_NA / weight_NA.sum(-1, keepdim=True)
        return weight_NA, Routing(probs_NE, expert_NA)

    def forward(self, x_BTD: torch.Tensor, valid_N: torch.Tensor | None = None) -> tuple[torch.Tensor, Routing]:
        """(B, T, D) -> (B, T, D) and the routing of the tokens at the flat positions valid_N, b * T + t (None: of all).

        The output at padding is zero; the residual stream carries those positions on, unused.
        """
        x_ND = x_BTD.flatten(0, 1)
        if valid_N is not None:
            x_ND = x_ND.index_select(0, valid_N)
        weight_NA, routing = self.route(x_ND)

        # Sort the N*A assignments by expert, so that each expert's tokens are contiguous: one gather before the experts
        # and one after them. (torch's grouped_mm would replace the loop, but needs the weights of all experts in one
        # tensor, and with a few large experts it was no faster on the CPU.)
        assigned = routing.expert_NA.flatten()                                                # (N*A)
        order = assigned.argsort(stable=True)
        numbers = torch.arange(len(self.experts), device=assigned.device)
        sizes = (assigned[:, None] == numbers).sum(0).tolist()        # here the CPU has to wait for the GPU
        inputs = x_ND.index_select(0, order // self.top_k).split(sizes)
        # An expert without tokens runs too, on an empty tensor. Its gradient is then zero instead of missing:
        # DistributedDataParallel waits for every gradient and would hang.
        outputs = torch.cat([expert(x) for expert, x in zip(self.experts, inputs)])           # (N*A, D), by expert
        outputs_NAD = outputs.index_select(0, order.argsort()).unflatten(0, (-1, self.top_k))  # by token again
        y_ND = (weight_NA[:, :, None] * outputs_NAD).sum(1).to(x_ND.dtype)                    # eq. 2
        if valid_N is not None:
            y_ND = torch.zeros_like(x_BTD).flatten(0, 1).index_copy(0, valid_N, y_ND)
        return y_ND.view_as(x_BTD), routing


def balance_loss(routing: Routing, row_N: torch.Tensor, n_rows: int) -> torch.Tensor:
    """How unevenly one layer uses its experts, per sequence: E * sum_e f_e P_e -> (B,). row_N: the sequence of each token.

    f_e is the fraction of the sequence's N*A assignments that went to expert e (a count: no gradient), P_e the router's
    mean probability of e (this carries the gradient). 1 for uniform routing, up to E if all tokens go to one expert.
    """
    # Switch Transformer, arXiv 2101.03961, eq. 4. The paper does not mention the term; its code adds it, from first
    # choices only and, in the dense-to-sparse stage, twice. We count all A choices and add it once.
    # Per sequence, so that the value does not depend on how a batch is split into micro-batches.
    n_expert = routing.probs_NE.shape[1]
    zeros_BE = routing.probs_NE.new_zeros(n_rows, n_expert)
    tokens_B1 = zeros_BE[:, :1].index_add(0, row_N, torch.ones_like(routing.probs_NE[:, :1])).clamp(min=1)
    chosen_NE = F.one_hot(routing.expert_NA, n_expert).sum(1).float()
    f_BE = zeros_BE.index_add(0, row_N, chosen_NE) / (tokens_B1 * routing.expert_NA.shape[1])
    P_BE = zeros_BE.index_add(0, row_N, routing.probs_NE) / tokens_B1
    return n_expert * (f_BE * P_BE).sum(1)


def expert_counts(routing: Routing, is_image_N: torch.Tensor) -> torch.Tensor:
    """Assignments per expert, for image and text tokens separately -> (2, E): row 0 image, row 1 text.

    A row divided by its sum is the load of each expert; comparing the two shows whether experts specialize by modality.
    Counts add up over micro-batches, ranks and steps.
    """
    n_expert = routing.probs_NE.shape[1]
    chosen_NE = F.one_hot(routing.expert_NA, n_expert).sum(1)
    image_E = (chosen_NE * is_image_N[:, None]).sum(0)
    return torch.stack([image_E, chosen_NE.sum(0) - image_E])


# -----------------------------------------------------------------------------
# From dense to sparse

def sparse_layers(layers: str | list[int], n_layer: int) -> list[int]:
    """Which decoder layers become sparse: "even" (0, 2, 4, ...), "all", "first_half", "second_half", or a list.

    The paper does not say. Its scripts use "even" (named `sparse` there), the only choice that gives the paper's 2.2B
    active parameters.
    """
    named = {
        "even": range(0, n_layer, 2),
        "all": range(n_layer),
        "first_half": range(0, n_layer // 2),
        "second_half": range(n_layer // 2, n_layer),
    }
    if isinstance(layers, str) and layers not in named:
        raise UserError(f"moe_layers={layers!r} is not known, expected one of {', '.join(named)}, or a list of numbers")
    chosen = sorted(set(named[layers] if isinstance(layers, str) else layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n_layer:
        raise UserError(f"moe_layers={layers!r}: layer numbers must lie between 0 and {n_layer - 1}, and one is needed")
    return chosen


def upcycle(llava: nn.Module, num_experts: int = 4, top_k: int = 2, layers: str | list[int] = "even",
            norm_topk: bool = True, seed: int = 0) -> None:
    """Turn the dense `llava` into a sparse one, in place (paper, section 3.2).

    Every expert starts as a copy of its layer's FFN. Only the routers are new: torch's default initialization of a
    Linear, drawn from `seed`, as in the released code. With renormalized weights the logits do not change. Raises UserError.
    """
    config = llava.config.decoder
    if config.num_experts:
        raise UserError(f"the model is sparse already ({config.num_experts} experts); upcycling needs a dense one")
    if not 1 <= top_k <= num_experts:
        raise UserError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
    chosen = sparse_layers(layers, config.n_layer)
    weight = llava.decoder.blocks[chosen[0]].ffn.down_proj.weight
    size = 3 * weight.nbytes * num_experts * len(chosen)
    require_memory(size, f"num_experts={num_experts:,} in {len(chosen)} layers", weight.device)
    if num_experts > MAX_EXPERTS:
        raise UserError(f"num_experts={num_experts:,} would take {size / 1e9:,.1f} GB, expected at most {MAX_EXPERTS:,}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in chosen:
            block = llava.decoder.blocks[i]
            experts = [copy.deepcopy(block.ffn) for _ in range(num_experts)]
            weight = experts[0].down_proj.weight
            sparse = SparseFFN(experts, config.n_embd, top_k, norm_topk)
            sparse.router.to(device=weight.device, dtype=weight.dtype)
            block.ffn = sparse
    config.num_experts, config.top_k, config.norm_topk, config.sparse_layers = num_experts, top_k, norm_topk, chosen
