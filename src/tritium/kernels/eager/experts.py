"""experts in torch, so that a token's bits do not depend on which others chose its expert.

Each expert's tokens are multiplied in tiles of `TILE_ROWS`, the last filled up with zeros (kernels/eager/linear.py says
why). It allocates, and reads only the weights of experts that a token has chosen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.eager import linear, reference
from tritium.kernels.kernel import Thunk


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.experts into outputs[0]. An expert that there is not gives a row of NaN."""
    x_TD, chosen_TJ, weights_TJ = args["x_TD"], args["chosen_TJ"], args["weights_TJ"]
    gate_up_EGD, down_EDF, kind = args["gate_up_EGD"], args["down_EDF"], args["kind"]
    tile, (_, size_G, size_D) = linear.TILE_ROWS, gate_up_EGD.shape
    x, out = (torch.zeros(tile, size_D, dtype=x_TD.dtype) for _ in range(2))
    both, hidden = (torch.empty(tile, size, dtype=x_TD.dtype) for size in (size_G, size_G // 2))
    gate, up = both.chunk(2, dim=-1)
    activate = reference.gated_activation({"gate": gate, "up": up, "kind": kind}, [hidden])

    def thunk() -> None:
        parts_TJD = torch.full((*chosen_TJ.shape, size_D), torch.nan, dtype=x_TD.dtype)
        for expert in chosen_TJ.unique().tolist():
            if not 0 <= expert < len(down_EDF):
                continue
            token, place = (chosen_TJ == expert).nonzero(as_tuple=True)
            first = linear.bind({"x": x, "weight_NK": gate_up_EGD[expert]}, [both])
            second = linear.bind({"x": hidden, "weight_NK": down_EDF[expert]}, [out])
            for start in range(0, len(token), tile):
                rows = token[start : start + tile]
                x.zero_()
                x[: len(rows)] = x_TD[rows]
                first()
                activate()
                second()
                parts_TJD[rows, place[start : start + tile]] = out[: len(rows)]
        total = torch.zeros(x_TD.shape, dtype=torch.float32)
        for j in range(chosen_TJ.shape[1]):
            total += parts_TJD[:, j].to(torch.float32) * weights_TJ[:, j, None].to(torch.float32)
        outputs[0].copy_(total)

    return thunk
