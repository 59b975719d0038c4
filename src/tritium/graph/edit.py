"""Changing a graph: normal form of a call, insertion with a spec, replacement that keeps provenance."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from tritium.graph.infer import infer
from tritium.graph.source import Source
from tritium.graph.spec import Spec

Target = torch._ops.OpOverload


def normalise(node: fx.Node) -> None:
    """Write the call's arguments in one form: every parameter that may be positional is, defaults filled in; the
    keyword-only ones all stand in kwargs. Does nothing for calls that are not torch ops."""
    if node.op != "call_function" or not isinstance(node.target, Target):
        return
    arguments = node.target._schema.arguments
    kwargs = dict(node.kwargs)
    args = list(node.args)
    positional = [a for a in arguments if not a.kwarg_only]
    for a in positional[len(args) :]:
        args.append(kwargs.pop(a.name) if a.name in kwargs else a.default_value)
    for a in arguments:
        if a.kwarg_only:
            kwargs.setdefault(a.name, a.default_value)
    node.args, node.kwargs = tuple(args), kwargs


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a torch op by parameter name, defaults filled in, in the schema's order."""
    assert isinstance(node.target, Target), node.target
    values = {}
    for index, a in enumerate(node.target._schema.arguments):
        if index < len(node.args) and not a.kwarg_only:
            values[a.name] = node.args[index]
        else:
            values[a.name] = node.kwargs.get(a.name, a.default_value)
    return values


def given(node: fx.Node) -> list[Any]:
    """Those of `arguments` that have no default: what a variant of the op, with more arguments, begins with."""
    assert isinstance(node.target, Target), node.target
    has_default = {a.name for a in node.target._schema.arguments if a.has_default_value()}
    return [value for name, value in arguments(node).items() if name not in has_default]


def insert(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    spec: Spec | None,
    *,
    like: fx.Node,
    kwargs: Mapping[str, Any] | None = None,
    covers: Iterable[fx.Node] = (),
    name: str | None = None,
) -> fx.Node:
    """A new call at the graph's insertion point; it takes the source of `like` and covers what `covers` covered."""
    if name is None and isinstance(target, Target):
        name = target._schema.name.partition("::")[2]
    node = graph.create_node("call_function", target, args, dict(kwargs or {}), name=name)
    normalise(node)
    covered = dict.fromkeys(name for c in covers for name in c.meta["covers"])
    node.meta = {"spec": spec, "source": like.meta.get("source", Source()), "covers": tuple(covered)}
    return node


def insert_inferred(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], *, like: fx.Node, kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """`insert` of a call with one tensor as result, whose spec is found by running it on meta tensors."""
    return insert(graph, target, args, infer(target, args, kwargs or {}), like=like, kwargs=kwargs)


def insert_input(graph: fx.Graph, kind: str, name: str, spec: Spec) -> fx.Node:
    """A new placeholder after the existing ones."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name.replace(".", "_"))
    node.meta = {"spec": spec, "source": Source(), "covers": (), "kind": kind, "name": name}
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Every user of `old` reads `new`; `old` is removed."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def output_node(graph: fx.Graph) -> fx.Node:
    """The graph's output node."""
    return next(n for n in reversed(graph.nodes) if n.op == "output")
