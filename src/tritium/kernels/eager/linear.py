"""linear through torch's own matrix product, written into place: what runs where there is no compiler.

How torch sums a row depends on the number of rows, and on which numbers it does depends on the CPU (measured: fp32 on
Zen 4 differs for 1-3, 5-7, 9-11 rows; on Emerald Rapids 4 rows differ from 64, and bf16 runs on AMX). So a product is
cut into calls of exactly TILE_ROWS rows, and a weight's first use checks that a row gets the same bits in every place
of such a tile. Where it does not, rows are multiplied one by one.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tritium.kernels.cpu.layout import Reads
from tritium.kernels.eager import reference
from tritium.kernels.kernel import Thunk

TILE_ROWS = 32  # the row's row_multiple in kernels/table.py
_is_even: dict[tuple[object, ...], bool] = {}  # by dtype, sizes and threads: is a row the same in each place of a tile?


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear(x, weight, bias) into outputs[0]. With a number of rows that no tile divides, one call for all."""
    reads, weight_NK, bias, out = Reads(), args["weight_NK"], args.get("bias"), outputs[0]
    x = reads.dense(args["x"])  # torch 2.13 reads beyond a strided bf16 row on AMX: NaN there becomes NaN here
    if x.dim() != 2:
        return reads.before(lambda: out.copy_(F.linear(x, weight_NK, bias)))
    step = x.shape[0]
    if step and step % TILE_ROWS == 0 and x.device.type == "cpu":
        step = TILE_ROWS if _keeps_rows_even(weight_NK, x.dtype) else 1
    calls = [_product(x[i : i + step], weight_NK, bias, out[i : i + step]) for i in range(0, x.shape[0], step or 1)]

    def thunk() -> None:
        for call in calls:
            call()

    return reads.before(thunk)


def bind_linear_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear_activation into outputs[0]: the linear, then the activation in place."""
    linear = bind(args, outputs)
    activate = reference.activation({"x": outputs[0], "kind": args["kind"]}, outputs)
    return lambda: (linear(), activate())


def bind_linear_gated(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear_gated into outputs[0]: the linear into a buffer of the bucket, then the activation of its halves."""
    both = outputs[0].new_empty((*outputs[0].shape[:-1], args["weight_NK"].shape[0]))
    linear, (gate, up) = bind(args, [both]), both.chunk(2, dim=-1)
    activate = reference.gated_activation({"gate": gate, "up": up, "kind": args["kind"]}, outputs)
    return lambda: (linear(), activate())


def bind_linear_add(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear_add into outputs[0]: the linear, then the residual added in place."""
    linear, out, residual = bind(args, outputs), outputs[0], args["residual"]
    return lambda: (linear(), out.add_(residual))


def bind_linear_pair(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear_pair into outputs[0]: the linear of a buffer of the bucket that holds both inputs side by side."""
    x, y = args["x"], args["y"]
    both = x.new_empty((*x.shape[:-1], x.shape[-1] + y.shape[-1]))
    linear = bind({**args, "x": both}, outputs)
    return lambda: (torch.cat((x, y), -1, out=both), linear())


def _product(x: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> Thunk:
    if bias is None:
        return partial(torch.mm, x, weight_NK.t(), out=out)
    return partial(torch.addmm, bias, x, weight_NK.t(), out=out)


def _keeps_rows_even(weight_NK: torch.Tensor, dtype: torch.dtype) -> bool:
    key = (dtype, weight_NK.shape, weight_NK.stride(), torch.get_num_threads())
    if key not in _is_even:
        row = torch.linspace(-1.0, 1.0, weight_NK.shape[1]).cos().to(dtype)
        result = row.expand(TILE_ROWS, -1).contiguous() @ weight_NK.t()
        _is_even[key] = bool((result == result[:1]).all())
    return _is_even[key]
