"""Write a graph for people (`graph.txt`) and for programs (`graph.json`). Equal graphs give equal texts."""

import json
from typing import Any

import torch
from torch import fx

from tritium.graph.edit import Target, arguments
from tritium.graph.source import Source
from tritium.graph.spec import dtype_name

KINDS = ("weight", "input", "kv")


def to_text(graph: fx.Graph) -> str:
    """One line a node, `name: type = op(arguments)  # line of code`, under a heading for each module of the model."""
    lines = [f"# {_count(graph)}", ""]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node in sorted(placeholders, key=lambda n: KINDS.index(n.meta["kind"])):
        if node.users or node.meta["kind"] != "weight":
            lines.append(f"{node.meta['kind']} {node.meta['name']}: {node.meta['spec']}")
    module: str | None = None
    for node in graph.nodes:
        if node.op == "call_function":
            source: Source = node.meta["source"]
            if source.module != module:
                module = source.module
                lines += ["", f"[{module or 'model'}]"]
            lines.append(_line(node, source))
        elif node.op == "output":
            lines += ["", f"return {', '.join(_name(n) for n in node.all_input_nodes)}"]
    return "\n".join(lines) + "\n"


def to_json(graph: fx.Graph) -> str:
    """Every node with op, arguments, type, source and the captured nodes it covers."""
    nodes = []
    for node in graph.nodes:
        if node.op == "placeholder":
            nodes.append({"name": node.meta["name"], "kind": node.meta["kind"], "type": str(node.meta["spec"])})
        elif node.op == "call_function":
            nodes.append({
                "name": node.name,
                "op": op_text(node.target),
                "args": {k: _plain(v) for k, v in _arguments(node).items()},
                "type": _type(node),
                "source": node.meta["source"]._asdict(),
                "covers": list(node.meta["covers"]),
            })  # fmt: skip
        elif node.op == "output":
            nodes.append({"kind": "output", "args": [_name(n) for n in node.all_input_nodes]})
    return json.dumps({"nodes": nodes}, indent=1) + "\n"


def op_text(target: Any) -> str:
    """`rms_norm`, `aten.add.Tensor`, `aten.cos` (the default overload is not named)."""
    if not isinstance(target, Target):
        return getattr(target, "__name__", str(target))
    text = str(target).removesuffix(".default")
    return text.removeprefix("tritium.")


def _count(graph: fx.Graph) -> str:
    calls = sum(node.op == "call_function" for node in graph.nodes)
    weights = sum(
        node.op == "placeholder" and node.meta["kind"] == "weight" and bool(node.users) for node in graph.nodes
    )
    return f"{calls} calls, {weights} weights. T tokens, S sequences, R sampled rows; -1: the runtime's choice."


def _line(node: fx.Node, source: Source) -> str:
    defaults = (
        {a.name: a.default_value for a in node.target._schema.arguments} if isinstance(node.target, Target) else {}
    )
    parts = []
    for name, value in _arguments(node).items():
        if isinstance(value, (fx.Node, list, tuple)):
            parts.append(_text(value))
        elif name not in defaults or value != defaults[name]:
            parts.append(f"{name}={_text(value)}")
    text = f"  {node.name}: {_type(node)} = {op_text(node.target)}({', '.join(parts)})"
    return f"{text:<100}  # {source.place}" if source.place else text


def _arguments(node: fx.Node) -> dict[str, Any]:
    if isinstance(node.target, Target):
        return arguments(node)
    return {str(i): value for i, value in enumerate(node.args)}


def _type(node: fx.Node) -> str:
    spec = node.meta["spec"]
    return "()" if spec is None else str(spec) if hasattr(spec, "dtype") else f"({', '.join(map(str, spec))})"


def _name(node: fx.Node) -> str:
    return node.meta["name"] if node.op == "placeholder" else node.name


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return _name(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return dtype_name(value) if isinstance(value, torch.dtype) else repr(value)


def _plain(value: Any) -> Any:
    """`value` as JSON holds it; a node is {"node": name}."""
    if isinstance(value, fx.Node):
        return {"node": _name(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value).removeprefix("torch.")
