"""Compute linears in fp8 and keep the KV cache in it.

Matches: `tritium.linear(x, w, b)` over tokens with a weight of the graph whose sizes are multiples of 16; not the one
    whose result is the logits.
Replaces with: `tritium.linear_fp8(*tritium.quantize_fp8(x), quantized(w), scales(w), b, dtype)`. Linears that read one
    value share its quantisation. Where x is a norm, a sum's norm or an activation that only such linears read, that op
    and the quantisation become one (`..._fp8`). A bias that such an op can add goes into it: `passes/move_biases.py`.
Keys and values are stored in fp8, without scales: they are cut off at ±448.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import fx

from tritium.engine.plan import KVGroup
from tritium.graph.derived import insert_weight, is_weight, recipe_of
from tritium.graph.edit import arguments, insert, output_node, replace
from tritium.graph.spec import Spec, args_of, dtype_name, spec_of
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.move_biases import move_biases
from tritium.passes.quantize import each_part
from tritium.passes.result import PassResult
from tritium.quant import schemes
from tritium.weights.recipes import Quantized, Reshape, Scales

_OURS = torch.ops.tritium
FP8 = torch.float8_e4m3fn
LINEAR = _OURS.linear.default
FUSED: dict[Any, Any] = {
    _OURS.rms_norm.default: _OURS.rms_norm_fp8.default,
    _OURS.add_rms_norm.default: _OURS.add_rms_norm_fp8.default,
    _OURS.add_layer_norm.default: _OURS.add_layer_norm_fp8.default,
    _OURS.activation.default: _OURS.activation_fp8.default,
    _OURS.gated_activation.default: _OURS.gated_activation_fp8.default,
}
GIVE_SUM = (_OURS.add_rms_norm_fp8.default, _OURS.add_layer_norm_fp8.default)


@dataclass(frozen=True)
class _Rows:
    """A value's rows in fp8 and their scales."""

    q: fx.Node
    scales: fx.Node


def quantize_linears_fp8(graph: fx.Graph) -> PassResult:
    """The first part of the module's docstring."""
    logits = set(output_node(graph).all_input_nodes)
    linears = [node for node in graph.nodes if _is_quantizable(node) and node not in logits]
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in linears:
        readers.setdefault(args_of(node)[0], []).append(node)
    for x, users in readers.items():
        rows = _quantized(x, users)
        for node in users:
            _rewrite(node, rows)
    remove_dead_code(graph)  # an op that became one with its quantisation reads nothing any more
    move_biases(graph)
    return PassResult(len(linears))


def store_fp8(graph: fx.Graph, groups: Sequence[KVGroup]) -> tuple[KVGroup, ...]:
    """The second part: the cache's placeholders and groups in fp8."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "kv":
            node.meta["spec"] = Spec(FP8, spec_of(node).shape)
    return tuple(msgspec.structs.replace(group, dtype=dtype_name(FP8)) for group in groups)


def _is_quantizable(node: fx.Node) -> bool:
    if node.target is not LINEAR:
        return False
    weight = args_of(node)[1]
    sizes = spec_of(weight).shape
    return is_weight(weight) and spec_of(node).rank == 2 and all(isinstance(n, int) and n % 16 == 0 for n in sizes)


def _quantized(x: fx.Node, users: list[fx.Node]) -> _Rows:
    """x in fp8: with the op that makes it, if nothing else reads x, else by an op of its own."""
    is_part = x.target is operator.getitem and args_of(x)[1] == 0
    maker = args_of(x)[0] if is_part else x
    is_only_read_here = set(x.users) == set(users)
    fused = FUSED.get(maker.target) if is_only_read_here and maker.op == "call_function" else None
    if fused is not None and spec_of(x).rank != 2:
        fused = None
    target = fused or _OURS.quantize_fp8.default
    source = maker if fused is not None else x
    given = arguments(maker) if fused is not None else {"x": x}
    args = tuple(given.get(a.name) for a in target._schema.arguments)  # x_bias, bias: none yet
    rows, scales = Spec(FP8, spec_of(x).shape), Spec(torch.float32, (spec_of(x).shape[0], 1))
    specs = (rows, scales, spec_of(x)) if fused in GIVE_SUM else (rows, scales)
    with x.graph.inserting_after(source):
        call = insert(x.graph, target, args, None, like=source, covers=[source] if fused is not None else [])
    call.meta["spec"] = specs
    parts = []
    after = call
    for i, spec in enumerate(specs):
        with x.graph.inserting_after(after):
            after = insert(x.graph, operator.getitem, (call, i), spec, like=source)
        parts.append(after)
    if len(parts) == 3:  # who read the sum of the old op reads the new one's
        for user in [user for user in maker.users if args_of(user)[1] == 1]:
            replace(user, parts[2])
    return _Rows(parts[0], parts[1])


def _rewrite(node: fx.Node, rows: _Rows) -> None:
    graph, (_, weight, bias) = node.graph, args_of(node)
    recipe, (num_out, _) = recipe_of(weight), spec_of(weight).shape
    name = weight.meta["name"]
    numbers = each_part(recipe, lambda part: Quantized(part, schemes.FP8))
    by_row = Reshape(each_part(recipe, lambda part: Scales(part, schemes.FP8)), (1, int(num_out)))  # type: ignore[arg-type]
    q = insert_weight(graph, f"{name}.fp8", numbers, Spec(FP8, spec_of(weight).shape))
    scales = insert_weight(graph, f"{name}.fp8_scales", by_row, Spec(torch.float32, (1, num_out)))
    with graph.inserting_before(node):
        args = (rows.q, rows.scales, q, scales, bias, dtype_name(spec_of(node).dtype))
        new = insert(graph, _OURS.linear_fp8.default, args, spec_of(node), like=node, covers=[node])
    replace(node, new)
