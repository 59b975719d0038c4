"""quantized_linear through torch: what runs where there is no compiler. The weight is widened in each call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.eager import linear
from tritium.kernels.kernel import Thunk
from tritium.ops.quantized import dequantize_weight, quantized_linear


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.quantized_linear into outputs[0]: exact with int8 activations, else in tiles of rows (eager/linear.py)."""
    kept, out = dict(args), outputs[0]
    if args["int8_activations"]:
        return lambda: out.copy_(quantized_linear(**kept))
    x, qweight, scales_NG, bias = args["x"], args["qweight"], args["scales_NG"], args.get("bias")

    def thunk() -> None:
        weight = dequantize_weight(qweight, scales_NG)
        wide = torch.empty(out.shape, dtype=torch.float32)
        inputs = {"x": x.float(), "weight_NK": weight, "bias": None if bias is None else bias.float()}
        linear.bind(inputs, [wide])()
        out.copy_(wide)

    return thunk
