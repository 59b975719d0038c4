"""What an exported graph asserts of the number of tokens, tried out.

torch.export gives up on conditions that it cannot prove, true ones among them: torch 2.11 meets
`min(16*T, 32*T) == 16*T` in causal attention. A lenient export leaves them in the graph as assertions.
"""

from typing import Any

import sympy
import torch
from torch import fx

aten = torch.ops.aten
LENGTHS = (*range(2, 130), 257, 1009, 4099, 65_537)  # T = 1 is what torch.export never considers


def holds_for_every_length(graph: fx.Graph, tokens: sympy.Symbol) -> bool:
    """True when every assertion of a freshly exported graph holds for all `LENGTHS` of its input.

    One about values, not sizes, is not known to hold.
    """
    conditions = [node.args[0] for node in graph.nodes if node.target is aten._assert_scalar.default]
    try:
        return all(_value(condition, tokens, length) for length in LENGTHS for condition in conditions)
    except _IsOfValuesError:
        return False


class _IsOfValuesError(Exception):
    """A number that is made from the values of a tensor."""


def _value(node: Any, tokens: sympy.Symbol, length: int) -> Any:
    """A number made from sizes, for an input of this length."""
    if not isinstance(node, fx.Node):
        return node
    if node.target is aten.sym_size.int:
        tensor, dim = node.args
        size = tensor.meta["val"].shape[dim]  # type: ignore[union-attr]
        return int(size) if isinstance(size, int) else int(size.node.expr.subs(tokens, length))
    if node.op != "call_function":
        raise _IsOfValuesError(node.name)
    return node.target(*(_value(arg, tokens, length) for arg in node.args))  # type: ignore[operator]
