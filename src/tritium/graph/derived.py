"""Weights that a pass makes of the model's own: a placeholder with a recipe over them, in place of a tensor."""

from collections.abc import Sequence
from itertools import takewhile

from torch import fx

from tritium.graph.edit import insert_input
from tritium.graph.spec import Spec, has_spec
from tritium.weights.recipes import Checkpoint, Recipe


def is_weight(node: object) -> bool:
    """True for a placeholder that stands for a weight."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.meta["kind"] == "weight" and has_spec(node)


def recipe_of(node: fx.Node) -> Recipe:
    """How a weight is computed from the model's own tensors; one of them is a leaf `Checkpoint`."""
    return node.meta.get("recipe") or Checkpoint(node.meta["name"])


def insert_weight(graph: fx.Graph, name: str, recipe: Recipe, spec: Spec) -> fx.Node:
    """A new weight placeholder; `name` gets a number when it is taken."""
    taken = {node.meta["name"] for node in graph.nodes if node.op == "placeholder"}
    free = next(n for n in (name, *(f"{name}.{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    node = insert_input(graph, "weight", free, spec)
    node.meta["recipe"] = recipe
    return node


def derived_weights(graph: fx.Graph) -> dict[str, Recipe]:
    """The recipes of all weights that passes have made and something reads, by name."""
    nodes = [node for node in graph.nodes if is_weight(node) and node.users and "recipe" in node.meta]
    return {node.meta["name"]: node.meta["recipe"] for node in nodes}


def joint_name(names: Sequence[str]) -> str:
    """One name for several: "a.q_proj.weight" and "a.k_proj.weight" are "a.q_proj+k_proj.weight"."""
    paths = [name.split(".") for name in names]
    start = _common(paths)
    end = _common([path[start:][::-1] for path in paths])
    middles = [".".join(path[start : len(path) - end]) for path in paths]
    return ".".join([*paths[0][:start], "+".join(middles), *paths[0][len(paths[0]) - end :]])


def _common(paths: list[list[str]]) -> int:
    """How many first words are the same in all paths."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False)))
