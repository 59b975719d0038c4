"""The matcher: where in a graph does a pattern occur?

A pattern is a small graph, captured from a spelling like a model. Its placeholders match any value; the rest must be
the same calls. Matching is exact in ops, casts and literals, except that

    arguments of commutative ops may be swapped;
    a number equal to one of the pattern's sentinels stands for an attribute: any number, the same everywhere;
    sizes need not be equal, but must correspond: where the pattern has 12, the graph has one size everywhere;
    the tokens in front may stand for several leading dimensions, where the pattern says so (`is_elementwise`).

Values inside a match may have users outside it: only the outputs are replaced, and what is still read stays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.graph.spec import Dim, Spec, has_spec, spec_of, target_of

aten = torch.ops.aten
COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.eq.Tensor})
VIEW, EXPAND, SLICE = aten.view.default, aten.expand.default, aten.slice.Tensor
LARGEST = 2**63 - 1  # "to the end"
# Arguments that are sizes, by position; torch's schemas do not tell them from other numbers.
SIZES = {SLICE: (2, 3), aten.layer_norm.default: (1,), aten.rms_norm.default: (1,)}


@dataclass(frozen=True)
class Pattern:
    """graph: in canonical form. sentinels: number in the graph -> the attribute it stands for.

    is_elementwise: every leading dimension is like the tokens' (norms, linears); else ranks must be equal.
    """

    graph: fx.Graph
    sentinels: Mapping[float, str] = field(default_factory=dict)
    is_elementwise: bool = False

    @property
    def outputs(self) -> list[fx.Node]:
        """What the pattern returns, in order."""
        (result,) = next(node for node in self.graph.nodes if node.op == "output").args
        return list(result) if isinstance(result, (tuple, list)) else [result]

    @property
    def inputs(self) -> dict[str, fx.Node]:
        """Placeholders by name."""
        return {node.meta["name"]: node for node in self.graph.nodes if node.op == "placeholder"}

    @property
    def size(self) -> int:
        """Number of calls."""
        return sum(node.op == "call_function" for node in self.graph.nodes)


@dataclass(frozen=True)
class Match:
    """A place where a pattern occurs.

    nodes: node of the pattern -> node of the graph. attributes: by name. sizes: size in the pattern -> in the graph.
    lead: the dimensions that the pattern's tokens stand for.
    """

    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    sizes: dict[int, Dim] = field(default_factory=dict)
    lead: tuple[Dim, ...] | None = None

    def bound(self, pattern: Pattern) -> dict[str, fx.Node]:
        """The graph's node for each of the pattern's inputs."""
        return {name: self.nodes[node] for name, node in pattern.inputs.items()}

    def covered(self) -> list[fx.Node]:
        """The graph's nodes that the pattern's calls stand for."""
        return [node for inner, node in self.nodes.items() if inner.op == "call_function"]


def find(pattern: Pattern, root: fx.Node) -> Match | None:
    """The match whose first output is `root`, or None. Further outputs are searched among the users of what matched."""
    first, *others = pattern.outputs
    if root.target is not first.target:
        return None
    for match in _node(pattern, first, root, Match()):
        complete = _others(pattern, others, match)
        if complete is not None:
            return complete
    return None


def _others(pattern: Pattern, outputs: Sequence[fx.Node], match: Match) -> Match | None:
    """Extend the match to the pattern's further outputs."""
    if not outputs:
        return match
    first, *rest = outputs
    for candidate in _candidates(first, match):
        for extended in _node(pattern, first, candidate, match):
            complete = _others(pattern, rest, extended)
            if complete is not None:
                return complete
    return None


def _candidates(output: fx.Node, match: Match) -> Iterator[fx.Node]:
    """Nodes that could be `output`: itself when known, else users, some calls away, of a node that matched."""
    if output in match.nodes:
        yield match.nodes[output]
        return
    steps: list[fx.Node] = [output]
    seen = {output}
    while steps:
        node = steps.pop(0)
        if node in match.nodes:
            yield from (n for n in _descendants(match.nodes[node]) if n.target is output.target)
            return
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                steps.append(operand)


def _descendants(node: fx.Node, depth: int = 8) -> Iterator[fx.Node]:
    level = {node: None}
    for _ in range(depth):
        level = {user: None for n in level for user in n.users}
        yield from level


def _node(pattern: Pattern, inner: fx.Node, node: Any, match: Match) -> Iterator[Match]:
    """Every way in which `inner` of the pattern is `node` of the graph, given what has matched."""
    if inner in match.nodes:
        if match.nodes[inner] is node:
            yield match
        return
    if not has_spec(node):
        return
    if inner.op == "call_function" and node.target is not inner.target:
        return
    unified = _spec(pattern, spec_of(inner), spec_of(node), match)
    if unified is None:
        return
    unified = replace(unified, nodes=unified.nodes | {inner: node})
    if inner.op == "placeholder":
        yield unified
        return
    orders = [list(node.args)]
    if inner.target in COMMUTATIVE and node.args[0] is not node.args[1]:
        orders.append([node.args[1], node.args[0], *node.args[2:]])
    for order in orders:
        names = list(node.kwargs)
        if names == list(inner.kwargs):
            values = [*order, *node.kwargs.values()]
            yield from _arguments(pattern, inner, [*inner.args, *inner.kwargs.values()], values, 0, unified)


def _arguments(
    pattern: Pattern, call: fx.Node, inner: Sequence[Any], outer: Sequence[Any], index: int, match: Match
) -> Iterator[Match]:
    """Match arguments from `index` on."""
    if len(inner) != len(outer):
        return
    if index == len(inner):
        yield match
        return
    for extended in _argument(pattern, call, index, inner[index], outer[index], match):
        yield from _arguments(pattern, call, inner, outer, index + 1, extended)


def _argument(pattern: Pattern, call: fx.Node, index: int, inner: Any, outer: Any, match: Match) -> Iterator[Match]:
    if isinstance(inner, fx.Node):
        yield from _node(pattern, inner, outer, match)
    elif isinstance(outer, fx.Node):
        return
    elif call.target in (VIEW, EXPAND) and index == 1:
        yield match  # the sizes of the result say it
    elif call.target is SLICE and index == 1:
        if inner - _rank(call) == outer - _rank(match.nodes[call]):
            yield match
    elif isinstance(inner, (list, tuple)):
        if isinstance(outer, (list, tuple)):
            if any(isinstance(item, fx.Node) for item in inner):
                yield from _arguments(pattern, call, inner, outer, 0, match)
            else:
                yield from _literals(pattern, index in SIZES.get(target_of(call), ()), inner, outer, match)
    else:
        yield from _literals(pattern, index in SIZES.get(target_of(call), ()), [inner], [outer], match)


def _literals(
    pattern: Pattern, is_size: bool, inner: Sequence[Any], outer: Sequence[Any], match: Match
) -> Iterator[Match]:
    if len(inner) != len(outer):
        return
    for a, b in zip(inner, outer, strict=True):
        extended = _literal(pattern, is_size, a, b, match)
        if extended is None:
            return
        match = extended
    yield match


def _literal(pattern: Pattern, is_size: bool, inner: Any, outer: Any, match: Match) -> Match | None:
    if is_size and isinstance(inner, int) and isinstance(outer, int):
        return _size(inner, outer, match)
    if isinstance(inner, (int, float)) and not isinstance(inner, bool) and inner in pattern.sentinels:
        name = pattern.sentinels[inner]
        if isinstance(outer, bool) or not isinstance(outer, (int, float)):
            return None
        if name in match.attributes:
            return match if match.attributes[name] == outer else None
        return replace(match, attributes=match.attributes | {name: outer})
    both_numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (inner, outer))
    same = inner == outer and (both_numbers or type(inner) is type(outer))
    return match if same else None


def _spec(pattern: Pattern, inner: Spec, outer: Spec, match: Match) -> Match | None:
    """Unify dtype and sizes."""
    if inner.dtype != outer.dtype:
        return None
    shape: tuple[Dim, ...] = outer.shape
    if pattern.is_elementwise and inner.shape and isinstance(inner.shape[0], Extent):
        rest = len(inner.shape) - 1
        if len(shape) <= rest:
            return None
        lead, shape = shape[: len(shape) - rest], shape[len(shape) - rest :]
        if match.lead not in (None, lead):
            return None
        match, dims = replace(match, lead=lead), inner.shape[1:]
    else:
        dims = inner.shape
    if len(dims) != len(shape):
        return None
    for a, b in zip(dims, shape, strict=True):
        unified = _size(a, b, match)
        if unified is None:
            return None
        match = unified
    return match


def _size(inner: Dim, outer: Dim, match: Match) -> Match | None:
    """One size of the pattern is one size of the graph everywhere; 0, 1, "to the end" and -n stand for themselves."""
    if isinstance(inner, Extent) or inner in (0, 1, LARGEST) or inner < 0:
        return match if inner == outer else None
    if inner in match.sizes:
        return match if match.sizes[inner] == outer else None
    return replace(match, sizes=match.sizes | {inner: outer})


def _rank(node: fx.Node) -> int:
    return spec_of(node).rank
