"""moe in torch, for no compiler: one row at a time, so that a row's bits do not depend on who chose the same expert.

torch sums a product by the number of its rows (linear.py). Here every product has one row, whose address is always that
of the same buffer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.kernel import Thunk
from tritium.ops.moe import expert_mlp, route


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.moe into outputs[0]."""
    x_TD, gate_up_EGD, down_EDF, out_TD = args["x_TD"], args["gate_up_EGD"], args["down_EDF"], outputs[0]
    row_1D = torch.empty((1, x_TD.shape[1]), dtype=x_TD.dtype, device=x_TD.device)
    sum_1D = torch.empty((1, x_TD.shape[1]), dtype=torch.float32, device=x_TD.device)

    def thunk() -> None:
        for t in range(x_TD.shape[0]):
            row_1D.copy_(x_TD[t : t + 1])
            experts, weights = route(args["router_TE"][t : t + 1], args["top_k"], args["is_normed"])
            sum_1D.zero_()
            for expert, weight in zip(experts[0].tolist(), weights[0].tolist(), strict=True):
                y_1D = expert_mlp(row_1D, gate_up_EGD[expert], down_EDF[expert], args["kind"])
                sum_1D.add_(y_1D.to(torch.float32), alpha=weight)
            out_TD[t : t + 1].copy_(sum_1D)

    return thunk
