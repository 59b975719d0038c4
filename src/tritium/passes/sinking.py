"""What passes that move one op down past others do alike."""

from collections.abc import Callable

from torch import fx

from tritium.graph.edit import replace
from tritium.graph.spec import has_spec
from tritium.passes.result import PassResult


def rewrite_calls(graph: fx.Graph, rewritten: Callable[[fx.Node], fx.Node | None]) -> PassResult:
    """Replace each call of one tensor by what `rewritten` inserts before it; None leaves it as it is."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not has_spec(node):
            continue
        with graph.inserting_before(node):
            new = rewritten(node)
        if new is not None:
            new.meta["covers"] = node.meta["covers"]
            replace(node, new)
            count += 1
    return PassResult(count)
