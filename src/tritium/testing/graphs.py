"""Helpers for tests of graphs and passes: capture a function, run a graph and check every type in it, try a pass.

T is 8 in every example, so no other size may be 8.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tritium.engine.plan import Extent, Sizes
from tritium.graph.capture import capture_function
from tritium.graph.derived import derived_weights
from tritium.graph.dump import op_text
from tritium.graph.grammar import verify_captured
from tritium.graph.spec import Spec
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_dead_code, remove_duplicates
from tritium.passes.fold_constants import constants_of
from tritium.passes.result import PassResult
from tritium.weights import recipes
from tritium.weights.source import DictSource

SIZES = Sizes(tokens=8, sequences=1, rows=8)
Spelled = Callable[..., Any]


def graph_of(
    fn: Spelled, example: Sequence[torch.Tensor], *, is_canonical: bool = True, weights: Collection[str] = ()
) -> fx.Graph:
    """`fn(*example)` as a graph, in the normal form that passes see unless told otherwise.

    weights: names of fn's parameters that are weights of the model; the others are inputs.
    """
    graph = capture_function(fn, example, {})
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["name"] in weights:
            node.meta["kind"] = "weight"
    if is_canonical:
        canonicalise(graph)
        remove_dead_code(graph)
        remove_duplicates(graph)
    return graph


def calls(graph: fx.Graph) -> list[str]:
    """What the graph calls, in order, without views."""
    views = ("aten.view", "aten.permute", "aten.slice.Tensor", "aten.expand")
    names = [op_text(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name for name in names if name not in views]


def evaluate(graph: fx.Graph, values: Mapping[str, torch.Tensor], sizes: Sizes = SIZES) -> list[torch.Tensor]:
    """Run the graph on tensors by placeholder name; asserts that every value has the type its node promises."""
    env: dict[fx.Node, Any] = {}
    results: list[torch.Tensor] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = values[node.meta["name"]] if node.users else None
        elif node.op == "output":
            results = [env[n] for n in node.all_input_nodes]
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": None}  # captured on meta tensors
            if node.meta["spec"] is not None or node.target.namespace == "tritium":  # no assertions about meta tensors
                is_view = node.target is torch.ops.aten.view.default  # of any layout: lowering adds the copies
                env[node] = torch.reshape(*args) if is_view else node.target(*args, **kwargs)
                _check_type(node, env[node], sizes)
    return results


def bound(graph: fx.Graph, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`values` and, computed from them by their recipes, the weights that passes have made."""
    constants = constants_of(graph)
    source = DictSource({name: value for name, value in values.items() if value.is_floating_point()})
    derived = {name: recipes.evaluate(tree, source, constants) for name, tree in derived_weights(graph).items()}
    return {**values, **constants, **derived}


def in_fp32(graph: fx.Graph) -> fx.Graph:
    """A copy in which every bf16 is fp32, casts to it too: what the graph means, without the rounding."""
    copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        new = copies[node] = copy.node_copy(node, copies.__getitem__)
        new.args, new.kwargs = fx.node.map_aggregate((new.args, new.kwargs), _widened_dtype)
        spec = node.meta["spec"]
        new.meta = {**node.meta, "spec": fx.node.map_aggregate(spec, _widened_dtype) if spec is not None else None}
    return copy


def widened(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers, those in bf16 as fp32."""
    return {name: x.float() if x.dtype == torch.bfloat16 else x for name, x in values.items()}


def _widened_dtype(value: Any) -> Any:
    return torch.float32 if value is torch.bfloat16 else value


def _check_type(node: fx.Node, value: Any, sizes: Sizes) -> None:
    spec = node.meta["spec"]
    if isinstance(spec, Spec):
        shape = [dim.at(sizes) if isinstance(dim, Extent) else dim for dim in spec.shape]
        assert value.dtype == spec.dtype and list(value.shape) == shape, f"{node.name} is {value.shape}, not {spec}"


def check_pass(
    run_pass: Callable[[fx.Graph], PassResult],
    fn: Spelled,
    example: Sequence[torch.Tensor],
    *,
    matches: int,
    tolerance: float | None = 0.0,
    is_canonical: bool = True,
    weights: Collection[str] = (),
) -> fx.Graph:
    """Capture `fn`, run the pass, and assert what holds of every pass; returns the graph.

    It matches `matches` times and, run again, not at all. The grammar holds. Every call still knows the model's line
    and the captured calls that it stands for. Every value has the promised type. Results are within `tolerance` of
    before (0: equal; None: not compared).
    """
    graph = graph_of(fn, example, is_canonical=is_canonical, weights=weights)
    names = [node.meta["name"] for node in graph.nodes if node.op == "placeholder"]
    values = dict(zip(names, example, strict=True))
    before = evaluate(graph, values)
    captured = {name for node in graph.nodes for name in node.meta["covers"]}
    result = run_pass(graph)
    assert result.num_matches == matches, f"{result.num_matches} matches, expected {matches}:\n{graph}"
    remove_dead_code(graph)
    verify_captured(graph)
    after = evaluate(graph, bound(graph, values))
    if tolerance is not None:
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=tolerance, equal_nan=True)
    for node in graph.nodes:
        if node.op == "call_function":
            assert node.meta["source"].place, f"{node.name} has lost its place in the model's code"
            assert set(node.meta["covers"]) <= captured, f"{node.name} covers calls that were not captured"
    assert run_pass(graph).num_matches == 0, f"a second run matches again:\n{graph}"
    return graph
