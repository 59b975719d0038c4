"""Move the sizes of channels from activations into weights, by vectors that calibration has found.

Matches: a norm (`tritium.rms_norm`, `tritium.layer_norm`) with a weight that only linears with a weight read, and all
    the linears that read it; and whose vector is known.
Replaces with: the same ops over `scaled(norm's weight, 1 / s)` and `scaled(w, s)`: what the linears give is as
    it was, but for rounding.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from tritium.graph.derived import insert_weight, is_weight, recipe_of
from tritium.graph.edit import arguments
from tritium.graph.spec import spec_of
from tritium.passes.merging import LINEAR
from tritium.passes.result import PassResult
from tritium.weights.recipes import Constant, Scaled

NORMS = (torch.ops.tritium.rms_norm.default, torch.ops.tritium.layer_norm.default)
SMOOTHING = ":smoothing"


@dataclass(frozen=True)
class Group:
    """A norm and every linear that reads it."""

    norm: fx.Node
    linears: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """Of the vector in the calibration: the norm's weight and `:smoothing`."""
        return arguments(self.norm)["weight"].meta["name"] + SMOOTHING


def smoothing_groups(graph: fx.Graph) -> list[Group]:
    """What could be smoothed, in the graph's order."""
    groups = []
    for node in graph.nodes:
        if node.target not in NORMS or not node.users or not is_weight(arguments(node)["weight"]):
            continue
        if all(_reads_as_rows(user, node) for user in node.users):
            groups.append(Group(node, tuple(node.users)))
    return groups


def smooth(graph: fx.Graph, *, vectors: Collection[str]) -> PassResult:
    """See the module's docstring. vectors: names of calibration tensors, some of which are `Group.name`s."""
    count = 0
    for group in smoothing_groups(graph):
        vector = Constant(group.name)  # before its weight is another
        if vector.name not in vectors:
            continue
        offset = arguments(group.norm).get("weight_offset") or 0.0
        for part in ("weight", "bias"):
            if (old := arguments(group.norm).get(part)) is not None:
                _scale(group.norm, old, vector, is_inverse=True, offset=offset if part == "weight" else 0.0)
        for linear in group.linears:
            _scale(linear, arguments(linear)["weight_NK"], vector, is_inverse=False, offset=0.0)
        count += 1
    return PassResult(count)


def _scale(node: fx.Node, weight: fx.Node, vector: Constant, *, is_inverse: bool, offset: float) -> None:
    recipe = Scaled(recipe_of(weight), vector, is_inverse, offset)
    new = insert_weight(node.graph, f"{weight.meta['name']}.smoothed", recipe, spec_of(weight))
    node.replace_input_with(weight, new)


def _reads_as_rows(user: fx.Node, x: fx.Node) -> bool:
    if user.target is not LINEAR:
        return False
    a = arguments(user)
    return a["x"] is x and is_weight(a["weight_NK"]) and a["weight_NK"] is not x and a["bias"] is not x
