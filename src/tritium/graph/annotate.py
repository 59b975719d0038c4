"""Turn torch.export's metadata into ours: dtype and sizes as `Spec`, place in the model's code as `Source`."""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.graph.source import Source
from tritium.graph.spec import IRREGULAR, NUM_TOKENS, Dim, Spec

ReadSize = Callable[[int | torch.SymInt], Dim]


def annotate(graph: fx.Graph, read_size: ReadSize) -> None:
    """Give every node of a freshly exported graph its spec and source, and drop torch's own metadata."""
    for node in graph.nodes:
        value = node.meta.get("val")
        node.meta = {key: node.meta[key] for key in ("kind", "name") if key in node.meta} | {
            "spec": _spec(value, read_size),
            "source": Source.of(node),
            "covers": (node.name,) if node.op == "call_function" else (),
        }


def symbolic_sizes(tokens: sympy.Symbol, most: int | None = None) -> ReadSize:
    """Sizes as expressions of torch's symbol for the number of tokens, of which a sequence has `most` at most."""
    memo: dict[sympy.Expr, Dim] = {}

    def read(size: int | torch.SymInt) -> Dim:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in memo:
            memo[expr] = _linear(_within(expr, tokens, most), tokens)
        return memo[expr]

    return read


def fixed_sizes(num_tokens: int) -> ReadSize:
    """Sizes as numbers; `num_tokens` stands for the number of tokens."""

    def read(size: int | torch.SymInt) -> Dim:
        return NUM_TOKENS if int(size) == num_tokens else int(size)

    return read


def _spec(value: Any, read_size: ReadSize) -> Any:
    """Spec of a fake tensor, tuple of them for a list, size for a number, None for anything else."""
    if isinstance(value, torch.Tensor):
        return Spec(value.dtype, tuple(read_size(size) for size in value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(_spec(item, read_size) for item in value)
    if isinstance(value, torch.SymInt):
        return read_size(value)
    return None


def _linear(expr: sympy.Expr, tokens: sympy.Symbol) -> Dim:
    """`expr` as a·T + d, or IRREGULAR when it is not."""
    if expr.is_Integer:
        return int(expr)
    if expr.free_symbols != {tokens} or not expr.is_polynomial(tokens):
        return IRREGULAR
    coefficients = sympy.Poly(expr, tokens).all_coeffs()
    if len(coefficients) != 2 or not all(c.is_Integer for c in coefficients):
        return IRREGULAR
    return Extent(tokens=int(coefficients[0]), constant=int(coefficients[1]))


def _within(expr: sympy.Expr, tokens: sympy.Symbol, most: int | None) -> sympy.Expr:
    """`expr` with the choice made in each max and min of two linear terms, where it is the same for all lengths."""
    if most is None:
        return expr
    chosen = expr
    for part in sympy.preorder_traversal(expr):
        name = type(part).__name__
        if name in ("Max", "Min") and len(part.args) == 2:
            a, b = part.args
            ends = [(a - b).subs(tokens, length) for length in (1, most)]
            if all(end >= 0 for end in ends) or all(end <= 0 for end in ends):
                is_first_larger = max(ends) > 0
                chosen = chosen.subs(part, a if is_first_larger == (name == "Max") else b)
    return sympy.expand(chosen)
