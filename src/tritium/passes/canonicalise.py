"""Bring a captured graph to the normal form that the other passes expect.

Matches: assertions and constraints; dropout in eval mode, detach, alias, clone, contiguous and other identities; casts
    in any spelling; calls with keywords or omitted defaults.
    The outer product, also as a product of a column and a row. `min` and `max` of two tensors.
Replaces with: nothing; their input; `aten.to.dtype(x, dtype, False, False, None)`, or the input where the dtype is
    already that; the same call with every argument written out, dimensions counted from the end (-1 is the last), so
    that `(x, dim=1)` on a matrix and `(x, -1)` are one spelling; `x[:, None] * y[None, :]`, what depends on the batch
    first and the result transposed where it was not. Views: views.py; permutations: permutes.py; casts: casts.py; a
    batch of one: leading_ones.py.
"""

from typing import Any

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.errors import CaptureError
from tritium.graph.edit import Target, arguments, insert, insert_inferred, normalise, replace
from tritium.graph.spec import args_of, has_spec, spec_of
from tritium.passes.casts import sink_casts
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.leading_ones import sink_leading_ones
from tritium.passes.permutes import sink_permutes
from tritium.passes.result import PassResult
from tritium.passes.views import CANONICAL, canonicalise_views

aten = torch.ops.aten
CAST = aten.to.dtype

ASSERTIONS = {
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.default,
    aten._assert_async.msg, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
}  # fmt: skip
IDENTITIES = {
    aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default,
    aten.lift_fresh.default, aten.detach_copy.default, aten.alias_copy.default,
}  # fmt: skip
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten._autocast_to_full_precision.default, aten._autocast_to_reduced_precision.default,
}  # fmt: skip


SYNONYMS = {aten.min.other: aten.minimum.default, aten.max.other: aten.maximum.default}
MAX_ROUNDS = 1000  # a rule moves something one call down a round; models have come to rest within 20
# They end: sizes of 1 in front sink below permutations, both below all arithmetic, casts below what cuts and joins, and
# no rule moves one of them up. tests/passes/test_normal_form.py gives a graph a number that every rule makes smaller.
RULES = (canonicalise_views, sink_leading_ones, sink_permutes, sink_casts)


def canonicalise(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = _calls(graph)
    for _ in range(MAX_ROUNDS):
        remove_dead_code(graph)  # what is dead still looks like a match
        changed = sum(rule(graph).num_matches for rule in RULES)
        if not changed:
            return PassResult(count)
        count += changed
    raise CaptureError(f"the graph's normal form was not reached in {MAX_ROUNDS} rounds: please report this model")


def _calls(graph: fx.Graph) -> int:
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        before = (node.args, node.kwargs)
        if node.target in ASSERTIONS:
            graph.erase_node(node)
            count += 1
        elif (same := _identity(node)) is not None:
            replace(node, same)
            count += 1
        elif node.target in SYNONYMS:
            node.target = SYNONYMS[node.target]
            count += 1
        elif node.target is aten.outer.default:
            replace(node, _outer(node))
            count += 1
        elif _is_column_by_row(node):
            replace(node, _broadcast_product(node))
            count += 1
        elif node.target in CASTS and node.target is not CAST:
            with graph.inserting_before(node):
                spec = spec_of(node)
                replace(node, insert(graph, CAST, (args_of(node)[0], spec.dtype), spec, like=node, covers=[node]))
            count += 1
        else:
            normalise(node)
            _count_dims_from_end(node)
            if node.target is aten.embedding.default:
                node.args = (*args_of(node)[:2], -1, False, False)  # the rest concerns gradients alone
            count += (node.args, node.kwargs) != before
    return count


def _outer(node: fx.Node) -> fx.Node:
    """x[:, None] * y[None, :]"""
    x, y = args_of(node)
    with node.graph.inserting_before(node):
        column = insert_inferred(node.graph, aten.view.default, (x, [-1, 1]), like=node)
        row = insert_inferred(node.graph, aten.view.default, (y, [1, -1]), like=node)
        return insert(node.graph, aten.mul.Tensor, (column, row), spec_of(node), like=node, covers=[node])


def _is_column_by_row(node: fx.Node) -> bool:
    """True for a matrix product whose sums have one term: [..., N, 1] by [..., 1, M]."""
    if node.target not in (aten.matmul.default, aten.mm.default, aten.bmm.default):
        return False
    column, row = (spec_of(x).shape for x in args_of(node))
    return len(column) > 1 and len(row) > 1 and column[-1] == row[-2] == 1


def _broadcast_product(node: fx.Node) -> fx.Node:
    """column * row; [..., M, N] and a transposition of it when M depends on the batch."""
    column, row = args_of(node)
    shape = spec_of(node).shape
    with node.graph.inserting_before(node):
        if not isinstance(shape[-1], Extent):
            return insert(node.graph, aten.mul.Tensor, (column, row), spec_of(node), like=node, covers=[node])
        factors = tuple(insert_inferred(node.graph, aten.transpose.int, (x, -2, -1), like=node) for x in (row, column))
        product = insert_inferred(node.graph, aten.mul.Tensor, factors, like=node)
        product.meta["covers"] = node.meta["covers"]
        return insert_inferred(node.graph, aten.transpose.int, (product, -2, -1), like=node)


def _identity(node: fx.Node) -> fx.Node | None:
    """The argument that the node returns unchanged, if it does."""
    if node.target in IDENTITIES:
        return args_of(node)[0]
    if node.target in DROPOUTS and not arguments(node)["train"]:
        return args_of(node)[0]
    if node.target in CASTS and spec_of(args_of(node)[0]).dtype == spec_of(node).dtype:
        return args_of(node)[0]
    return None


def _count_dims_from_end(node: fx.Node) -> None:
    """Rewrite `dim` arguments as negative numbers; the canonical views keep theirs, counted from the start."""
    if not isinstance(node.target, Target) or node.target in CANONICAL or not has_spec(_first_tensor(node)):
        return
    rank = spec_of(_first_tensor(node)).rank + (node.target in (aten.stack.default, aten.unsqueeze.default))
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dim" and index < len(node.args) and rank:
            node.update_arg(index, _negative(args_of(node)[index], rank))


def _first_tensor(node: fx.Node) -> Any:
    """The first argument, or the first of a list of tensors."""
    first = args_of(node)[0] if node.args else None
    return first[0] if isinstance(first, (list, tuple)) and first else first


def _negative(dim: Any, rank: int) -> Any:
    if isinstance(dim, int):
        return dim if dim < 0 else dim - rank
    return [_negative(d, rank) for d in dim] if isinstance(dim, (list, tuple)) else dim
