"""Add and normalise in one step.

Matches: `tritium.rms_norm(x + residual, w, ...)` and `tritium.layer_norm(x + residual, w, b, eps)`, the spellings of
    `tritium.add_rms_norm` and `tritium.add_layer_norm`: both summands of one shape and type, the sum perhaps read by
    others too (the next residual, a second norm), the weight not computed in the graph.
Replaces with: `tritium.add_rms_norm(x, residual, w, ...)`, which gives the norm and the sum. Bits do not change.
"""

import functools
import operator

import torch
from torch import fx

from tritium import ops
from tritium.graph.edit import insert, replace
from tritium.graph.match import Match, Pattern, find
from tritium.graph.spec import spec_of
from tritium.passes.recognise import pattern_of
from tritium.passes.result import PassResult

OPS = ("add_rms_norm", "add_layer_norm")
NORMS = (torch.ops.tritium.rms_norm.default, torch.ops.tritium.layer_norm.default)


def fuse_add_norm(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.target not in NORMS:
            continue
        for op, spelling, pattern in _patterns(spec_of(node).dtype):
            match = find(pattern, node)
            if match is not None and _rewrite(op, spelling, pattern, match):
                count += 1
                break
    return PassResult(count)


def _rewrite(op: ops.Op, spelling: ops.Spelling, pattern: Pattern, match: Match) -> bool:
    norm, total = (match.nodes[output] for output in pattern.outputs)
    inputs = match.bound(pattern)
    if any(inputs[name].op != "placeholder" for name in ("weight", "bias") if name in inputs):
        return False  # it may be computed after the sum, in whose place the new call stands
    values = inputs | match.attributes | dict(spelling.binds)
    target = ops.target(op.name)
    args = tuple(values.get(a.name, a.default_value) for a in target._schema.arguments)
    with norm.graph.inserting_before(total):
        both = insert(norm.graph, target, args, None, like=norm, covers=[total, norm])
        both.meta["spec"] = (spec_of(norm), spec_of(total))
        parts = [insert(norm.graph, operator.getitem, (both, i), both.meta["spec"][i], like=old, covers=[old])
                 for i, old in enumerate((norm, total))]  # fmt: skip
    for old, part in zip((norm, total), parts, strict=True):
        replace(old, part)
    return True


@functools.cache
def _patterns(dtype: torch.dtype) -> list[tuple[ops.Op, ops.Spelling, Pattern]]:
    rows = [(op, spelling) for op in map(ops.op_named, OPS) for spelling in op.spellings]
    return [(op, spelling, pattern_of(op, spelling, dtype)) for op, spelling in rows]
