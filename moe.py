"""
The sparse mixture of experts: one FFN becomes E FFNs and a router that sends every token to A of them.

For a token x (paper, eqs. 2-4), with W_r the router's matrix and E_e the e-th expert:

    r   = softmax(x W_r)                      probability of each expert                 (eq. 3)
    r~  = r on the A largest entries, 0 elsewhere                                        (eq. 4)
    y   = sum_e r~_e E_e(x)                                                              (eq. 2)

By default the A kept weights are divided by their sum. The paper prints eq. 4 without that division, its released code has
it, and we follow the code: every expert starts as a copy of the same dense FFN (`upcycle`), so weights that sum to 1 make
the sparse model equal to its dense origin at step 0, while raw ones would shrink each FFN to about A/E of its output.
`norm_topk=False` is the paper's equation to the letter.

Not here, on purpose: capacity (no token is ever dropped), noise on the router (the same input always takes the same
experts), and padding (it is neither routed nor counted). The released code has all three, through DeepSpeed.

Names end in the letters of their shape; the key stands in model.py. Here N is the number of real tokens.
"""
import copy
from typing import NamedTuple

import torch
from torch import nn
import torch.nn.functional as F


class Routing(NamedTuple):
    """Where one sparse layer sent its N real tokens."""
    probs_NE: torch.Tensor    # softmax of the router over all experts, fp32, with gradient
    expert_NA: torch.Tensor   # the chosen experts, most probable first


class SparseFFN(nn.Module):
    """Router and experts in place of one dense FFN.

    `experts` is a list of FFN modules (N, D) -> (N, D); this file does not need to know what is inside them.
    """

    def __init__(self, experts: list[nn.Module], n_embd: int, top_k: int, norm_topk: bool = True):
        super().__init__()
        assert 1 <= top_k <= len(experts), f"top_k={top_k} must lie between 1 and the number of experts, {len(experts)}"
        self.router = nn.Linear(n_embd, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.top_k = top_k
        self.norm_topk = norm_topk

    def route(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """(N, D) -> the weights of the chosen experts (N, A), and the routing."""
        with torch.autocast(x_ND.device.type, enabled=False):        # in bf16 close experts would change places
            probs_NE = F.linear(x_ND.float(), self.router.weight.float()).softmax(-1)    # eq. 3
        weight_NA, expert_NA = probs_NE.topk(self.top_k, dim=-1)                         # eq. 4
        if self.norm_topk and self.top_k == 1:
            # Renormalised, a single weight is the constant 1, and a constant teaches the router nothing.
            # r / stop_gradient(r) has the value 1 as well, and the router's gradient.
            weight_NA = weight_NA / weight_NA.detach()
        elif self.norm_topk:
            weight_NA = weight_NA / weight_NA.sum(-1, keepdim=True)
        return weight_NA, Routing(probs_NE, expert_NA)

    @torch.compiler.disable(recursive=False)    # sizes depend on the data: under torch.compile only the experts are compiled
    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor | None = None) -> tuple[torch.Tensor, Routing]:
        """(B, T, D) -> (B, T, D) and the routing of the tokens where `valid_BT` is true (None: of all tokens).

        Padding gets zeros: only the residual stream carries it on, and nobody reads it.
        """
        if valid_BT is None:
            valid_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        x_ND = x_BTD[valid_BT]
        weight_NA, routing = self.route(x_ND)

        # Put the N*A assignments in the order of their experts, so that each expert's tokens stand side by side: one gather
        # before the experts, one after them. (torch's grouped_mm does the loop in one call, but wants the experts' matrices
        # stacked in one tensor, and with a few experts of large matrices it was no faster where we measured, on the CPU.)
        expert = routing.expert_NA.flatten()                         # (N*A)
        order = expert.argsort(stable=True)
        sizes = expert.bincount(minlength=len(self.experts)).tolist()
        # An expert that nobody chose still runs, on zero tokens: its gradient is then zero, not missing, and
        # DistributedDataParallel, which waits for every gradient, does not hang.
        inputs = x_ND[order // self.top_k].split(sizes)
        outputs = torch.cat([expert(x) for expert, x in zip(self.experts, inputs)])           # (N*A, D), by expert
        outputs_NAD = outputs[order.argsort()].unflatten(0, (-1, self.top_k))                 # by token again
        y_ND = (weight_NA[:, :, None] * outputs_NAD).sum(1).to(x_ND.dtype)                    # eq. 2
        y_BTD = torch.zeros_like(x_BTD)
        y_BTD[valid_BT] = y_ND
        return y_BTD, routing


def balance_loss(routing: Routing, valid_BT: torch.Tensor) -> torch.Tensor:
    """How unevenly one layer's experts are used, per sequence: E * sum_e f_e P_e -> (B,).

    f_e is the share of the sequence's N*A assignments that expert e received (a count: no gradient), P_e the mean
    probability that the router gave it (the gradient goes through here). Even routing gives exactly 1, one expert for
    everybody gives up to E. The paper does not mention the term; its code adds it, from first choices only and, in the
    dense-to-sparse stage, twice. We count all A choices and add it once (Switch Transformer, arXiv 2101.03961, eq. 4).
    Per sequence, so that the value does not depend on how a batch is cut into micro-batches.
    """
    n_expert = routing.probs_NE.shape[1]
    rows_N = torch.where(valid_BT)[0]                                 # the sequence that each real token belongs to
    tokens_B1 = valid_BT.sum(1, keepdim=True).clamp(min=1)
    chosen_NE = F.one_hot(routing.expert_NA, n_expert).sum(1).float()
    zeros_BE = routing.probs_NE.new_zeros(valid_BT.shape[0], n_expert)
    f_BE = zeros_BE.index_add(0, rows_N, chosen_NE) / (tokens_B1 * routing.expert_NA.shape[1])
    P_BE = zeros_BE.index_add(0, rows_N, routing.probs_NE) / tokens_B1
    return n_expert * (f_BE * P_BE).sum(1)


def expert_counts(routing: Routing, valid_BT: torch.Tensor, image_BT: torch.Tensor) -> torch.Tensor:
    """Assignments per expert, image tokens and text tokens apart -> (2, E): row 0 image, row 1 text.

    Divide a row by its sum to get the load of each expert; the two rows together tell whether experts specialise by
    modality. Counts add over micro-batches, ranks and steps.
    """
    n_expert = routing.probs_NE.shape[1]
    chosen_NE = F.one_hot(routing.expert_NA, n_expert).sum(1)
    is_image_N = image_BT[valid_BT]
    return torch.stack([chosen_NE[is_image_N].sum(0), chosen_NE[~is_image_N].sum(0)])


# -----------------------------------------------------------------------------
# From dense to sparse

def sparse_layers(layers: str | list[int], n_layer: int) -> list[int]:
    """Which decoder layers become sparse: "even" (0, 2, 4, ...), "all", "first_half", "second_half", or a list.

    The paper does not say; its scripts use "even" (they call it `sparse`), and only that gives its 2.2B active parameters.
    """
    named = {
        "even": range(0, n_layer, 2),
        "all": range(n_layer),
        "first_half": range(0, n_layer // 2),
        "second_half": range(n_layer // 2, n_layer),
    }
    if isinstance(layers, str) and layers not in named:
        raise ValueError(f"moe_layers={layers!r} is not known; choose one of {', '.join(named)}, or a list of layer numbers")
    chosen = sorted(set(named[layers] if isinstance(layers, str) else layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n_layer:
        raise ValueError(f"moe_layers={layers!r}: layer numbers must lie between 0 and {n_layer - 1}, and one is needed")
    return chosen


def upcycle(llava: nn.Module, num_experts: int = 4, top_k: int = 2, layers: str | list[int] = "even",
            norm_topk: bool = True, seed: int = 0) -> None:
    """Turn the dense `llava` into a sparse one, in place (paper, section 3.2).

    Every expert starts as a copy of its layer's FFN; only the routers are new (torch's default Linear initialisation,
    from `seed`, as in the released code). Attention, norms, embeddings and adaptor stay what they are. With renormalised
    weights the logits do not change. Raises ValueError if the model is sparse already or the numbers make no sense.
    """
    config = llava.config.decoder
    if config.num_experts:
        raise ValueError(f"the model is sparse already ({config.num_experts} experts): upcycling needs a dense one")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
    chosen = sparse_layers(layers, config.n_layer)
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
