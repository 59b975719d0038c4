"""Find our ops in plain torch.

Matches: every spelling of every op (`ops/`), captured by the same capture and brought to the same normal form, with any
    attributes and sizes; larger spellings first, so that a gated activation is not taken for an activation.
Replaces with: `tritium.<op>(...)`. What the spelling computed on the way stays where something else reads it.
"""

import functools
import inspect
from collections.abc import Iterable

import torch
from torch import fx

from tritium import ops
from tritium.graph.capture import capture_function
from tritium.graph.edit import Target, insert, replace
from tritium.graph.infer import infer
from tritium.graph.match import Match, Pattern, find
from tritium.graph.spec import has_spec, spec_of
from tritium.graph.vocabulary import VIEWS
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_dead_code, remove_duplicates
from tritium.passes.result import PassResult

PLAIN = frozenset({*VIEWS, torch.ops.aten.add.Tensor})  # in every model; no spelling consists of these alone
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def recognise(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    if all(_is_ours(node) or node.target in PLAIN for node in graph.nodes if node.op == "call_function"):
        return PassResult(0)
    return _recognise(graph, dtypes(graph))


def _recognise(graph: fx.Graph, of: Iterable[torch.dtype]) -> PassResult:
    counts: dict[str, int] = {}
    for op, spelling, pattern in sorted(_patterns(of), key=lambda row: -row[2].size):
        for node in list(graph.nodes):
            match = find(pattern, node) if node.op == "call_function" else None
            if match is not None and rewrite(node, ops.target(op.name), spelling, pattern, match):
                name = f"{op.name}.{spelling.name}"
                counts[name] = counts.get(name, 0) + 1
        remove_dead_code(graph)
    return PassResult(sum(counts.values()), tuple(counts.items()))


def rewrite(root: fx.Node, target: Target, spelling: ops.Spelling, pattern: Pattern, match: Match) -> bool:
    """Put the op `target` in the root's place; False when it would not give the root's type."""
    values = match.bound(pattern) | match.attributes | dict(spelling.binds)
    args = tuple(values.get(a.name, a.default_value) for a in target._schema.arguments)
    if infer(target, args, {}) != spec_of(root):
        return False
    with root.graph.inserting_before(root):
        new = insert(root.graph, target, args, spec_of(root), like=root, covers=match.covered())
    replace(root, new)
    return True


def _patterns(dtypes: Iterable[torch.dtype]) -> list[tuple[ops.Op, ops.Spelling, Pattern]]:
    return [row for dtype in dtypes for row in _patterns_in(dtype)]


@functools.cache
def _patterns_in(dtype: torch.dtype) -> list[tuple[ops.Op, ops.Spelling, Pattern]]:
    """Every spelling as a pattern; 35 exports, about a second, once per process and dtype."""
    return [
        (op, spelling, pattern_of(op, spelling, dtype))
        for op in ops.OPS
        if op.name != "attention" and not op.is_fused  # recognise_attention.py finds any layout of heads and tokens
        for spelling in op.spellings
    ]


def pattern_of(op: ops.Op, spelling: ops.Spelling, dtype: torch.dtype, *, is_recognised: bool = False) -> Pattern:
    """The graph of a spelling for activations of `dtype`. is_recognised: our ops are found in it, as in a model."""
    example = [tensor for tensor in spelling.example(dtype) if tensor is not None]
    graph = capture_function(spelling.fn, example, spelling.attributes)
    canonicalise(graph)
    remove_dead_code(graph)
    remove_duplicates(graph)
    if is_recognised:
        _recognise(graph, [dtype])
        canonicalise(graph)
        remove_dead_code(graph)
    tensors = [name for name in inspect.signature(spelling.fn).parameters if name not in spelling.attributes]
    return Pattern(
        graph,
        sentinels={value: name for name, value in spelling.attributes.items() if isinstance(value, (int, float))},
        is_elementwise=not any("_T" in name for name in tensors),
    )


def dtypes(graph: fx.Graph) -> list[torch.dtype]:
    """The floating types that the model computes in: those of its matrices."""
    weights = [n for n in graph.nodes if n.op == "placeholder" and n.meta["kind"] == "weight" and has_spec(n)]
    found = dict.fromkeys(spec_of(n).dtype for n in weights if spec_of(n).rank == 2)
    return [dtype for dtype in found if dtype in FLOATS]


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, Target) and node.target.namespace == "tritium"
