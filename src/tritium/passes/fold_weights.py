"""Do at binding what the graph does to a weight alone.

Matches: `aten.permute(w, [1, 0])`, `aten.slice(w, dim, start, end, 1)` and `aten.to.dtype(w)` of a weight, when every
    user of w is one of these and the results take no more memory than w.
Replaces with: a weight with the recipe `transpose(w)`, `slice(w)` or `cast(w)`. Bits do not change. What it is for:
    linears kept as [in, out] or inside one larger matrix can then be merged with others.
"""

import math
from typing import Any

import torch
from torch import fx

from tritium.graph.derived import insert_weight, is_weight, recipe_of
from tritium.graph.edit import replace
from tritium.graph.spec import args_of, dtype_name, has_spec, spec_of
from tritium.passes.result import PassResult
from tritium.weights.recipes import Cast, Recipe, Slice, Transpose
from tritium.weights.source import FLOAT_DTYPES

aten = torch.ops.aten


def fold_weights(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    waiting = [node for node in graph.nodes if is_weight(node)]
    while waiting:
        weight = waiting.pop()
        users = list(weight.users)
        trees = [_recipe(node, weight) for node in users]
        if not users or None in trees or sum(map(_bytes, users)) > _bytes(weight):
            continue
        for node, (tree, suffix) in zip(users, [tree for tree in trees if tree is not None], strict=True):
            folded = insert_weight(graph, f"{weight.meta['name']}.{suffix}", tree, spec_of(node))
            replace(node, folded)
            waiting.append(folded)
            count += 1
    return PassResult(count)


def _recipe(node: fx.Node, weight: fx.Node) -> tuple[Recipe, str] | None:
    """What the call does to the weight, and a word for it; None when that is no recipe."""
    args: tuple[Any, ...] = args_of(node)
    if not has_spec(node):
        return None
    if node.target is aten.permute.default and list(args[1]) == [1, 0]:
        return Transpose(recipe_of(weight)), "transposed"
    if node.target is aten.slice.Tensor and args[4] == 1:
        return Slice(recipe_of(weight), *args[1:4]), f"{args[2]}-{args[3]}"
    if node.target is aten.to.dtype and dtype_name(spec_of(node).dtype) in FLOAT_DTYPES:
        return Cast(recipe_of(weight), dtype_name(spec_of(node).dtype)), dtype_name(spec_of(node).dtype)
    return None


def _bytes(node: fx.Node) -> int:
    spec = spec_of(node)
    sizes = [size for size in spec.shape if isinstance(size, int)]  # a weight has no others
    return math.prod(sizes) * spec.dtype.itemsize
