"""moe: a mixture of experts over router logits. Its reference.

One op, because which rows an expert reads depends on data: written out, it cannot be captured.
E experts, T tokens, D model, F intermediate, G = 2 F.
"""

import torch
import torch.nn.functional as F

from tritium.ops.activations import activation
from tritium.ops.op import Op, like_first


def route(router_TE: torch.Tensor, top_k: int, is_normed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [T, top_k], the likeliest first (of equal ones the lower number), and their fp32 weights.

    Weights are a softmax over all experts, or, when is_normed, over the chosen ones.
    """
    logits_TE = router_TE.to(torch.float32)
    order_TE = logits_TE.sort(dim=-1, descending=True, stable=True).indices
    experts_TK = order_TE[:, :top_k]
    chosen_TK = logits_TE.gather(1, experts_TK)
    if is_normed:
        return experts_TK, torch.softmax(chosen_TK, dim=-1)
    return experts_TK, torch.softmax(logits_TE, dim=-1).gather(1, experts_TK)


def moe(
    x_TD: torch.Tensor,
    router_TE: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    top_k: int,
    is_normed: bool,
    kind: str,
) -> torch.Tensor:
    """Each token's top_k experts, `down(act(gate(x)) * up(x))`, by their weights (see `route`): [T, D], like x.

    gate_up_EGD: the gate's F rows of each expert, then the up projection's. kind: an activation. Products are rounded
    as `linear` rounds them, the sum over a token's experts is fp32 and rounded once.
    """
    experts_TK, weights_TK = route(router_TE, top_k, is_normed)
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in range(gate_up_EGD.shape[0]):
        tokens, places = (experts_TK == expert).nonzero(as_tuple=True)
        y_SD = expert_mlp(x_TD[tokens], gate_up_EGD[expert], down_EDF[expert], kind)
        out_TD.index_add_(0, tokens, y_SD.to(torch.float32) * weights_TK[tokens, places, None])
    return out_TD.to(x_TD.dtype)


def expert_mlp(x_SD: torch.Tensor, gate_up_GD: torch.Tensor, down_DF: torch.Tensor, kind: str) -> torch.Tensor:
    """One expert on some rows: [S, D]."""
    gate, up = F.linear(x_SD, gate_up_GD).chunk(2, dim=-1)
    return F.linear(activation(gate, kind) * up, down_DF)


MOE = Op(
    name="moe",
    schema="moe(Tensor x_TD, Tensor router_TE, Tensor gate_up_EGD, Tensor down_EDF, int top_k, bool is_normed, "
    "str kind) -> Tensor",
    reference=moe,
    fake=like_first,
)
