"""Remove what nothing reads.

Matches: a call without users that writes nothing; two calls of one op with the same arguments (the second is removed).
Replaces with: nothing; the first of the two. Placeholders stay: they are the model's interface.
"""

from typing import Any

from torch import fx

from tritium.graph.edit import Target, replace
from tritium.passes.result import PassResult


def remove_dead_code(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not _writes(node):
            graph.erase_node(node)
            count += 1
    return PassResult(count)


def remove_duplicates(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    seen: dict[Any, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or _writes(node) or _reads_state(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))
        first = seen.setdefault(key, node)
        if first is not node:
            first.meta["covers"] = tuple(dict.fromkeys(first.meta["covers"] + node.meta["covers"]))
            replace(node, first)
            count += 1
    return PassResult(count)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, Target) and node.target._schema.is_mutable


def _reads_state(node: fx.Node) -> bool:
    """True for a call that reads the KV cache: equal arguments do not mean equal results."""
    return any(n.op == "placeholder" and n.meta["kind"] == "kv" for n in node.all_input_nodes)


def _frozen(value: Any) -> Any:
    """A hashable stand-in; numbers of different types stay different (1 is not 1.0 is not True)."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    return value if isinstance(value, (fx.Node, str)) else (type(value), value)
