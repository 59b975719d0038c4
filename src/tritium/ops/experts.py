"""experts: a mixture of gated MLPs, of which every token goes through a few."""

import torch
import torch.nn.functional as F

from tritium.ops.activations import gated_activation
from tritium.ops.op import Op, like_first


def experts(
    x_TD: torch.Tensor,
    chosen_TJ: torch.Tensor,
    weights_TJ: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """Σ_j weights[t, j] * down_e(act(gate_e(x_t)) * up_e(x_t)) with e = chosen[t, j] (int64): [T, D].

    gate_up holds F rows of the gate, then F of what it gates (G = 2F). An expert's result is rounded to x's dtype; the
    sum over j is in fp32, in the order of j, cast once.
    """
    num_tokens, num_chosen = chosen_TJ.shape
    parts_TJD = torch.empty((num_tokens, num_chosen, x_TD.shape[1]), dtype=x_TD.dtype, device=x_TD.device)
    for expert in chosen_TJ.unique().tolist():
        token, place = (chosen_TJ == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], gate_up_EGD[expert]).chunk(2, dim=-1)
        parts_TJD[token, place] = F.linear(gated_activation(gate, up, kind), down_EDF[expert])
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for j in range(num_chosen):
        out_TD = out_TD + parts_TJD[:, j].to(torch.float32) * weights_TJ[:, j, None].to(torch.float32)
    return out_TD.to(x_TD.dtype)


EXPERTS = Op(
    name="experts",
    schema="experts(Tensor x_TD, Tensor chosen_TJ, Tensor weights_TJ, Tensor gate_up_EGD, Tensor down_EDF, str kind) "
    "-> Tensor",
    reference=experts,
    fake=like_first,
)
