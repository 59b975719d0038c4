"""Compute linears in 8 bits: rows of activations with a scale each, rows of weights with a scale each. For GPUs.

Matches: `tritium.linear(x, w, b)` over rows with a weight of the graph, unless `left_out` names a tensor it is made of.
    In fp8: whose sizes are multiples of 16, and not the one whose result is the logits.
Replaces with: `tritium.linear_<format>(*tritium.quantize_<format>(x), quantized(w), scales(w), b, dtype)`, in int8 or
    fp8. Linears that read one value share its quantisation. Where x is a norm, a sum's norm or an activation that only
    such linears read, that op and the quantisation become one. What calibration has learned takes the place of
    rounding: a weight's numbers and scales; one scale for all rows of x. In fp8 a bias that such an op can add goes
    into it (`passes/move_biases.py`), and, where nothing was learned, two linears that are added (`merge_outputs`), one
    of an activation, become `tritium.linear_fp8(*tritium.activation_pair_fp8(x, y, bias, kind), ...)`: one sum over
    both inputs, of rows with one scale.

`store_fp8`: keys and values are stored in fp8, without scales: they are cut off at ±448.
"""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import torch
from torch import fx

from tritium.engine.plan import KVGroup
from tritium.errors import CaptureError
from tritium.graph.derived import insert_weight, is_weight, recipe_of
from tritium.graph.edit import arguments, insert, output_node, replace
from tritium.graph.spec import Spec, args_of, dtype_name, spec_of
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.merge_outputs import PAIR, merge_outputs
from tritium.passes.move_biases import move_biases
from tritium.passes.quantize import INPUT_SCALE, base_name, each_part, is_left_out, numbers_of, scales_of_part
from tritium.passes.result import PassResult
from tritium.quant.schemes import FP8 as FP8_WEIGHT
from tritium.quant.schemes import QuantScheme, WeightFormat
from tritium.quant.weights import DTYPES
from tritium.weights.recipes import Concat, Constant, Recipe, Reshape

_OURS = torch.ops.tritium
FP8 = torch.float8_e4m3fn
LINEAR, ACTIVATION, ALL_GATHER = _OURS.linear.default, _OURS.activation.default, _OURS.all_gather.default
BASES = ("rms_norm", "add_rms_norm", "add_layer_norm", "activation", "gated_activation")  # what can quantise its rows
GIVE_SUM = ("add_rms_norm", "add_layer_norm")


@dataclass(frozen=True)
class _Rows:
    """A value's rows in 8 bits and their scales."""

    q: fx.Node
    scales: fx.Node


def quantize_linears(
    graph: fx.Graph, *, scheme: QuantScheme, left_out: Sequence[str] = (), calibrated: Collection[str] = ()
) -> PassResult:
    """The first part of the module's docstring. left_out: names of checkpoint or module tensors, `*` and `?` as in file
    names. calibrated: names of calibration tensors.

    Raises `CaptureError` when that leaves no linear.
    """
    kept = scheme.weight
    logits = set(map(_own_part, output_node(graph).all_input_nodes)) if kept == FP8_WEIGHT else set()
    linears = [node for node in graph.nodes if _is_quantizable(node, kept, left_out) and node not in logits]
    if not linears:
        raise CaptureError(
            f"scheme={scheme.name!r}: there is no linear to quantise beside those that unquantized={tuple(left_out)!r} "
            "leaves out; build with scheme=None"
        )
    if kept == FP8_WEIGHT and not calibrated:
        merge_outputs(graph, partial(_can_share_rows, linears=frozenset(linears)))
    pairs = [node for node in graph.nodes if node.target is PAIR]
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is LINEAR and node in linears:
            readers.setdefault(args_of(node)[0], []).append(node)
    for x, users in readers.items():
        rows = _quantized(x, users, kept, calibrated)
        for node in users:
            _rewrite(node, rows, kept, calibrated)
    for node in pairs:
        _rewrite(node, _rows_of_pair(node), kept, calibrated)
    remove_dead_code(graph)  # an op that became one with its quantisation reads nothing any more
    if kept == FP8_WEIGHT:
        move_biases(graph)
    return PassResult(len(linears) - len(pairs))


def store_fp8(graph: fx.Graph, groups: Sequence[KVGroup]) -> tuple[KVGroup, ...]:
    """The last part: the cache's placeholders and groups in fp8."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "kv":
            node.meta["spec"] = Spec(FP8, spec_of(node).shape)
    return tuple(msgspec.structs.replace(group, dtype=dtype_name(FP8)) for group in groups)


def _own_part(result: fx.Node) -> fx.Node:
    """What a rank computes of a result that is gathered from all."""
    return args_of(result)[0] if result.target is ALL_GATHER else result


def _is_quantizable(node: fx.Node, kept: WeightFormat, left_out: Sequence[str]) -> bool:
    if node.target is not LINEAR:
        return False
    weight = args_of(node)[1]
    if not is_weight(weight) or spec_of(node).rank != 2 or is_left_out(recipe_of(weight), left_out):
        return False
    multiple = 16 if kept == FP8_WEIGHT else 1
    return all(isinstance(n, int) and n % multiple == 0 for n in spec_of(weight).shape)


def _can_share_rows(pair: list[fx.Node], linears: Collection[fx.Node]) -> bool:
    """Two linears to be quantised, the second one's input an activation, neither input read by anything else."""
    x, y = (args_of(node)[0] for node in pair)
    is_alone = x is not y and len(x.users) == len(y.users) == 1
    return is_alone and all(node in linears for node in pair) and y.target is ACTIVATION


def _rows_of_pair(node: fx.Node) -> _Rows:
    """The rows of linear_pair's two inputs side by side, the second's activation with them."""
    x, y = args_of(node)[:2]
    source, kind = (arguments(y)[name] for name in ("x", "kind"))
    num_rows = spec_of(x).shape[0]
    width = int(spec_of(x).shape[1]) + int(spec_of(y).shape[1])  # type: ignore[arg-type]  # numbers, both
    target = _OURS.activation_pair_fp8.default
    with node.graph.inserting_before(node):
        call = insert(node.graph, target, (x, source, None, kind, None), None, like=y, covers=[y])
        call.meta["spec"] = specs = (Spec(FP8, (num_rows, width)), Spec(torch.float32, (num_rows, 1)))
        parts = [insert(node.graph, operator.getitem, (call, i), spec, like=call) for i, spec in enumerate(specs)]
    return _Rows(*parts)


def _quantized(x: fx.Node, users: list[fx.Node], kept: WeightFormat, calibrated: Collection[str]) -> _Rows:
    """x in 8 bits: with the op that makes it, if nothing else reads x, else by an op of its own."""
    is_part = x.target is operator.getitem and args_of(x)[1] == 0
    maker = args_of(x)[0] if is_part else x
    base = _base_of(maker) if set(x.users) == set(users) and spec_of(x).rank == 2 else None
    target = getattr(_OURS, f"{base or 'quantize'}_{kept.kind}").default
    source = maker if base is not None else x
    scale = _input_scale(users, calibrated)
    given = (arguments(maker) if base is not None else {"x": x}) | {"scale": scale}
    args = tuple(given.get(a.name) for a in target._schema.arguments)  # x_bias, bias: none yet
    rows, scales = Spec(DTYPES[kept.kind], spec_of(x).shape), Spec(torch.float32, (spec_of(x).shape[0], 1))
    specs = (rows, scales, spec_of(x)) if base in GIVE_SUM else (rows, scales)
    with x.graph.inserting_after(source):
        covers = [source] if base is not None else []
        call = insert(x.graph, target, args, None, like=source if covers else users[0], covers=covers)
    call.meta["spec"] = specs
    parts = []
    after = call
    for i, spec in enumerate(specs):
        with x.graph.inserting_after(after):
            after = insert(x.graph, operator.getitem, (call, i), spec, like=call)
        parts.append(after)
    if len(parts) == 3:  # who read the sum of the old op reads the new one's
        for user in [user for user in maker.users if args_of(user)[1] == 1]:
            replace(user, parts[2])
    return _Rows(parts[0], parts[1])


def _base_of(maker: fx.Node) -> str | None:
    """The name of an op that can quantise its own rows."""
    return next((base for base in BASES if maker.target is getattr(_OURS, base).default), None)


def _input_scale(users: list[fx.Node], calibrated: Collection[str]) -> fx.Node | None:
    """The scale that calibration has found for what these linears read: each of their weights' parts has the same."""
    for node in users:
        weight = args_of(node)[1]
        for part in _parts(recipe_of(weight)):
            if (name := base_name(part) + INPUT_SCALE) in calibrated:
                return insert_weight(node.graph, f"{weight.meta['name']}.input_scale", Constant(name), _ONE)
    return None


_ONE = Spec(torch.float32, (1,))


def _parts(recipe: Recipe) -> tuple[Recipe, ...]:
    if isinstance(recipe, Concat) and recipe.dim == 0:
        return tuple(leaf for part in recipe.parts for leaf in _parts(part))
    return (recipe,)


def _rewrite(node: fx.Node, rows: _Rows, kept: WeightFormat, calibrated: Collection[str]) -> None:
    graph, (weight, bias) = node.graph, (arguments(node)[name] for name in ("weight_NK", "bias"))
    recipe, (num_out, _) = recipe_of(weight), spec_of(weight).shape
    name = f"{weight.meta['name']}.{kept.kind}"
    numbers = each_part(recipe, lambda part: numbers_of(part, kept, calibrated))
    scales = each_part(recipe, lambda part: scales_of_part(part, kept, calibrated))
    q = insert_weight(graph, name, numbers, Spec(DTYPES[kept.kind], spec_of(weight).shape))
    by_row = Reshape(scales, (1, int(num_out)))  # type: ignore[arg-type]  # a weight's sizes are numbers
    by_out = insert_weight(graph, f"{name}_scales", by_row, Spec(torch.float32, (1, num_out)))
    with graph.inserting_before(node):
        args = (rows.q, rows.scales, q, by_out, bias, dtype_name(spec_of(node).dtype))
        target = getattr(_OURS, f"linear_{kept.kind}").default
        new = insert(graph, target, args, spec_of(node), like=node, covers=[node])
    replace(node, new)
