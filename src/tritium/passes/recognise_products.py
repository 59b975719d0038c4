"""Find linears that are written as products.

Matches: `aten.matmul(x, w)`, `aten.mm(x, w)` and `aten.addmm(bias, x, w)` with a weight w [K, N], or anything made of
    weights alone.
Replaces with: `tritium.linear(x, permute(w), bias)`.
"""

from typing import Any

import torch
from torch import fx

from tritium.graph.edit import arguments, insert, insert_inferred, replace
from tritium.graph.spec import args_of, spec_of
from tritium.graph.vocabulary import VIEWS
from tritium.passes.result import PassResult

aten = torch.ops.aten


def recognise_products(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
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
