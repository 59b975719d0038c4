"""Find linears that are written as products, and norms without weights.

Matches: `aten.matmul(x, w)`, `aten.mm(x, w)` and `aten.addmm(bias, x, w)` with a weight w [K, N], or anything made of
    weights alone. `aten.layer_norm` over the last dimension without weight and bias.
Replaces with: `tritium.linear(x, permute(w), bias)`; `tritium.layer_norm(x, ones)`, the ones a constant.
"""

from typing import Any

import torch
from torch import fx

from tritium.graph.derived import insert_weight
from tritium.graph.edit import arguments, insert, insert_inferred, replace
from tritium.graph.spec import Spec, args_of, spec_of
from tritium.graph.vocabulary import VIEWS
from tritium.passes.result import PassResult
from tritium.weights.recipes import Constant

aten = torch.ops.aten


def recognise_products(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.target is aten.layer_norm.default and _has_no_weight(node):
            replace(node, _layer_norm(node))
            count += 1
            continue
        factors = _factors(node)
        if factors is None or not _is_weight(factors[1]) or spec_of(factors[0]).rank < 2:
            continue
        x, weight, bias = factors
        with graph.inserting_before(node):
            weight_NK = insert_inferred(graph, aten.permute.default, (weight, [1, 0]), like=node)
            args = (x, weight_NK, bias)
            new = insert(graph, torch.ops.tritium.linear.default, args, spec_of(node), like=node, covers=[node])
        replace(node, new)
        count += 1
    return PassResult(count)


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node, Any] | None:
    """x, w and bias of a product."""
    if node.target in (aten.matmul.default, aten.mm.default):
        x, weight = args_of(node)[:2]
        return x, weight, None
    if node.target is aten.addmm.default:
        a = arguments(node)
        if a["beta"] == a["alpha"] == 1 and spec_of(a["self"]).rank == 1:
            return a["mat1"], a["mat2"], a["self"]
    return None


def _is_weight(node: fx.Node) -> bool:
    """True for a matrix that is a weight of the model, perhaps transposed or cut."""
    if spec_of(node).rank != 2:
        return False
    while node.target in VIEWS:
        node = args_of(node)[0]
    return node.op == "placeholder" and node.meta["kind"] == "weight"


def _has_no_weight(node: fx.Node) -> bool:
    a = arguments(node)
    return a["weight"] is None and a["bias"] is None and len(a["normalized_shape"]) == 1


def _layer_norm(node: fx.Node) -> fx.Node:
    """The norm with a constant of ones as its weight."""
    a, dtype = arguments(node), spec_of(node).dtype
    name = f"constant.{node.name}.ones"
    weight = insert_weight(node.graph, name, Constant(name), Spec(dtype, tuple(a["normalized_shape"])))
    weight.meta |= {"recipe": Constant(weight.meta["name"]), "value": torch.ones(a["normalized_shape"], dtype=dtype)}
    with node.graph.inserting_before(node):
        args = (a["input"], weight, None, a["eps"])
        return insert(node.graph, torch.ops.tritium.layer_norm.default, args, spec_of(node), like=node, covers=[node])
