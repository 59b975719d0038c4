"""The rows (`pass_cases.py`) of passes that quantise. T is 8."""

from collections.abc import Callable
from functools import partial

import torch
from torch import fx

from tritium import ops
from tritium.errors import CaptureError
from tritium.ops.quantized import quantize_rows
from tritium.passes.fuse_add_norm import fuse_add_norm
from tritium.passes.quantize import keep_stored, quantize
from tritium.passes.quantize_embedding import quantize_embedding
from tritium.passes.quantize_kv import quantize_kv
from tritium.passes.quantize_norms import quantize_norms
from tritium.passes.quantize_rows import quantize_linears
from tritium.passes.result import PassResult
from tritium.quant.schemes import INT8, scheme_named
from tritium.testing.optimising_cases import CACHED, W3, Tensor, W, heads, mlp, x
from tritium.testing.pass_cases import Case, Row


def in_int8(a: Tensor, q: Tensor, s: Tensor) -> Tensor:
    """A quantised linear."""
    return ops.quantized_linear(a, q, s, None, True)


def sums_multiplied(a: Tensor, n: Tensor, q: Tensor, s: Tensor) -> Tensor:
    """Two residual sums, each read by its norm and the next sum, the norms by quantised linears."""
    total = a + a.exp()
    after = total + in_int8(ops.rms_norm(total, n, 1e-5), q, s)
    return after * in_int8(ops.layer_norm(after, n, None, 1e-5), q, s)


def unless_none(graph: fx.Graph, run: Callable[[fx.Graph], PassResult]) -> PassResult:
    """`run`, which refuses a graph without linears to quantise: here that is no match."""
    try:
        return run(graph)
    except CaptureError:
        return PassResult(0)


def wide_read_twice(a: Tensor, w: Tensor, w2: Tensor) -> Tensor:
    """Two linears of one value, which something else reads too."""
    return ops.linear(a, w, None) * ops.linear(a, w2, None) + a


IDS = torch.arange(8) * 2 % 7
WIDE = (x(8, 16), x(16, 16), x(32, 16))
NORMED = (x(), torch.rand(12) + 0.5, *quantize_rows(x(12, 12)))


QUANTISING: dict[str, Row] = {
    "quantize": Row(
        run=partial(unless_none, run=partial(quantize, scheme=scheme_named("w8a8"))),
        match=Case(lambda a, w: ops.linear(a, w, None), (x(), W)),
        near_miss=Case(lambda a, b: ops.linear(a, b, None), (x(), W), 0),
        several_readers=Case(lambda a, w: (h := ops.linear(a, w, None)) * h.sigmoid() + a, (x(), W)),
        chain=Case(mlp, (x(), W3, x(12, 20)), 2),
        weights=("w", "w2"),
        tolerance=0.1,
    ),
    "keep_stored": Row(
        run=partial(keep_stored, stored={"w": INT8, "w2": INT8}),
        match=Case(lambda a, w: ops.linear(a, w, None), (x(), W)),
        near_miss=Case(lambda a, w3: ops.linear(a, w3, None), (x(), W), 0),
        several_readers=Case(lambda a, w: (h := ops.linear(a, w, None)) * h.sigmoid() + a, (x(), W)),
        chain=Case(mlp, (x(), W3, x(12, 20)), 2),
        weights=("w", "w2", "w3"),
        tolerance=0.1,
    ),
    "quantize_embedding": Row(
        run=partial(unless_none, run=quantize_embedding),
        match=Case(lambda input_ids, w: ops.embedding(input_ids, w) * 2.0, (IDS, W3)),
        near_miss=Case(lambda positions, w: ops.embedding(positions, w) * 2.0, (IDS, W3), 0),
        several_readers=Case(
            lambda input_ids, w: ops.linear(h := ops.embedding(input_ids, w), w, None) + h[:, :1], (IDS, W3)
        ),
        chain=Case(
            lambda input_ids, w, w2: ops.embedding(input_ids, w) * ops.embedding(input_ids, w2), (IDS, W3, W3 + 1.0), 2
        ),
        weights=("w", "w2"),
        tolerance=0.1,
    ),
    "quantize_rows": Row(  # in fp8, which leaves out the linear that gives the logits
        run=partial(unless_none, run=partial(quantize_linears, scheme=scheme_named("fp8"))),
        match=Case(lambda a, w: ops.linear(a, w, None) * 2.0, WIDE[:2]),
        near_miss=Case(lambda a, w: ops.linear(a, w, None), WIDE[:2], 0),
        several_readers=Case(wide_read_twice, (WIDE[0], WIDE[1], WIDE[1] + 0.1), 2),
        chain=Case(lambda a, w, w2: mlp(a, w, w2) * 2.0, (WIDE[0], WIDE[2], x(16, 32)), 2),
        weights=("w", "w2"),
        tolerance=0.2,
    ),
    "quantize_norms": Row(
        run=quantize_norms,
        match=Case(lambda a, n, q, s: in_int8(ops.rms_norm(a, n, 1e-5), q, s) + a, NORMED),
        near_miss=Case(lambda a, n, q, s: in_int8(a, q, s) + ops.rms_norm(a, n, 1e-5), NORMED, 0),
        several_readers=Case(
            lambda a, n, q, s: in_int8(h := ops.layer_norm(a, n, None, 1e-5), q, s) * in_int8(h, q, s) + a, NORMED
        ),
        chain=Case(sums_multiplied, NORMED, 2, before=(fuse_add_norm,)),
        weights=("n", "q", "s"),
    ),
    "quantize_kv": Row(
        run=lambda graph: quantize_kv(graph, ())[0],
        match=Case(lambda a: ops.attention(heads(a), heads(a) * 2.0, heads(a) + 1.0, 0.5), (x(),), before=CACHED),
        near_miss=Case(lambda a: ops.activation(a, "silu"), (x(),), 0, before=CACHED),
        several_readers="a layer's cache is read and written by that layer alone",
        chain=Case(
            lambda a: ops.attention(ops.attention(*[heads(a)] * 3, 0.5), *[heads(a)] * 2, 0.5), (x(),), 2, CACHED
        ),
        tolerance=0.1,
    ),
}
