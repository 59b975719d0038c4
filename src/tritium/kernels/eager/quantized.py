"""quantized_linear, alone and with an activation, through torch: what runs where there is no compiler.

The weight is widened in each call.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.eager import linear, reference
from tritium.kernels.kernel import Thunk
from tritium.ops.quantized import dequantize_weight, quantized_linear


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.quantized_linear into outputs[0]: exact with int8 activations, else in tiles of rows (eager/linear.py)."""
    kept, out = {name: value for name, value in args.items() if name not in ("kind", "residual")}, outputs[0]
    if args["int8_activations"]:
        return lambda: out.copy_(quantized_linear(**kept))
    x, qweight, scales_NG, bias = args["x"], args["qweight"], args["scales_NG"], args.get("bias")

    def thunk() -> None:
        weight = dequantize_weight(qweight, scales_NG)
        wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        inputs = {"x": x.float(), "weight_NK": weight, "bias": None if bias is None else bias.float()}
        linear.bind(inputs, [wide])()
        out.copy_(wide)

    return thunk


def bind_quantized_linear_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.quantized_linear_activation into outputs[0]: the linear, then the activation in place."""
    multiply = bind(args, outputs)
    activate = reference.activation({"x": outputs[0], "kind": args["kind"]}, outputs)
    return lambda: (multiply(), activate())


def bind_quantized_linear_gated(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.quantized_linear_gated into outputs[0]: the linear into a buffer, then the activation of its halves."""
    both = outputs[0].new_empty((*outputs[0].shape[:-1], args["qweight"].shape[0]))
    multiply, (gate, up) = bind(args, [both]), both.chunk(2, dim=-1)
    activate = reference.gated_activation({"gate": gate, "up": up, "kind": args["kind"]}, outputs)
    return lambda: (multiply(), activate())


def bind_quantized_linear_add(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.quantized_linear_add into outputs[0]: the linear, then the residual added in place."""
    multiply, out, residual = bind(args, outputs), outputs[0], args["residual"]
    return lambda: (multiply(), out.add_(residual))
