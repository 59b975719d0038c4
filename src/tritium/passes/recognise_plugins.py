"""Find a plugin's ops.

Matches: every spelling of every op of the plugins, brought to the normal form in which the model stands, Tritium's ops
    recognised in both: a spelling may be plain torch or use `tritium.ops`. Larger spellings first.
Replaces with: the plugin's op. What the spelling computed on the way stays where something else reads it.
Stands right after the proof that no value mixes tokens, so a plugin need not be believed in that: what it takes was
proven in plain form. And before all fusing, so that what a user's own op takes is nobody else's.
"""

from torch import fx

from tritium.graph.foreign import Targets
from tritium.graph.match import find
from tritium.passes import recognise as plain
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.result import PassResult


def recognise_plugins(graph: fx.Graph, targets: Targets) -> PassResult:
    """See the module's docstring. targets: by the ops' names in plans."""
    counts: dict[str, int] = {}
    rows = [
        (name, target, spelling, plain.pattern_of(op, spelling, dtype, is_recognised=True))
        for dtype in plain.dtypes(graph)
        for name, (op, target) in targets.items()
        for spelling in op.spellings
    ]
    for name, target, spelling, pattern in sorted(rows, key=lambda row: -row[-1].size):
        for node in list(graph.nodes):
            match = find(pattern, node) if node.op == "call_function" else None
            if match is not None and plain.rewrite(node, target, spelling, pattern, match):
                rule = f"{name}.{spelling.name}"
                counts[rule] = counts.get(rule, 0) + 1
        remove_dead_code(graph)
    return PassResult(sum(counts.values()), tuple(counts.items()))
