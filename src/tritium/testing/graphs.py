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
from tritium.graph.spec import Spec, target_of
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
                env[node] = _call(node, args, kwargs, sizes)
                if node.users:  # offsets of bags that nobody reads are none
                    _check_type(node, env[node], sizes)
    return results


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: Sizes) -> Any:
    if node.target is torch.ops.aten.view.default:  # of any layout: lowering adds the copies
        return torch.reshape(*args)
    if node.target is torch.ops.aten.expand.default:  # a size that depends on the batch is written as in a plan
        return args[0].expand(_sizes(node.meta["spec"], sizes))
    return target_of(node)(*args, **kwargs)


def bound(graph: fx.Graph, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`values` and, computed from them by their recipes, the weights that passes have made."""
    constants = constants_of(graph)
    source = DictSource({name: value for name, value in values.items() if value.is_floating_point()})
    known = {**values, **constants}
    derived = {name: recipes.evaluate(tree, source, known) for name, tree in derived_weights(graph).items()}
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
        assert value.dtype == spec.dtype and list(value.shape) == _sizes(spec, sizes), (
            f"{node.name} is {value.shape}, not {spec}"
        )


def _sizes(spec: Spec, sizes: Sizes) -> list[int]:
    return [dim.at(sizes) if isinstance(dim, Extent) else dim for dim in spec.shape]


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
    """Capture `fn`, run the pass, and assert what `check_run` does; returns the graph."""
    graph = graph_of(fn, example, is_canonical=is_canonical, weights=weights)
    names = [node.meta["name"] for node in graph.nodes if node.op == "placeholder"]
    check_run(graph, run_pass, dict(zip(names, example, strict=True)), matches=matches, tolerance=tolerance)
    return graph


def check_run(
    graph: fx.Graph,
    run_pass: Callable[[fx.Graph], PassResult],
    values: Mapping[str, torch.Tensor],
    *,
    matches: int,
    tolerance: float | None = 0.0,
) -> None:
    """Run the pass on the graph, whose placeholders have these values, and assert what holds of every pass.

    It matches `matches` times and, run again, not at all. The grammar holds. Every call still knows the model's line
    and the captured calls that it stands for. Every value has the promised type. Results are within `tolerance` of
    before (0: equal; None: not compared). What a batch has besides its tokens is that of one sequence (`one_sequence`).
    """
    before = evaluate(graph, {**values, **one_sequence(graph)})
    captured = {name for node in graph.nodes for name in node.meta["covers"]}
    result = run_pass(graph)
    assert result.num_matches == matches, f"{result.num_matches} matches, expected {matches}:\n{graph}"
    remove_dead_code(graph)
    verify_captured(graph)
    after = evaluate(graph, {**bound(graph, values), **one_sequence(graph)})
    if tolerance is not None:
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=tolerance, equal_nan=True)
    for node in graph.nodes:
        if node.op == "call_function":
            assert node.meta["source"].place, f"{node.name} has lost its place in the model's code"
            assert set(node.meta["covers"]) <= captured, f"{node.name} covers calls that were not captured"
    assert run_pass(graph).num_matches == 0, f"a second run matches again:\n{graph}"


def one_sequence(graph: fx.Graph) -> dict[str, torch.Tensor]:
    """What passes add to a graph's inputs, for one sequence of 8 tokens from its start, all of them sampled.

    Caches of two blocks, of which the second comes first; slots never written are NaN.
    """
    block = SIZES.tokens // 2
    values = {
        "sampled_rows": torch.arange(SIZES.rows),
        "cu_seqlens_q": torch.tensor([0, SIZES.tokens], dtype=torch.int32),
        "context_lens": torch.tensor([SIZES.tokens], dtype=torch.int32),
        "batch_counts": torch.tensor([1, SIZES.tokens, SIZES.rows, 0], dtype=torch.int32),
    }
    for node in graph.nodes:
        name = node.meta["name"] if node.op == "placeholder" else ""
        if name.startswith("slot_mapping."):
            values[name] = (torch.arange(SIZES.tokens) + block) % SIZES.tokens
        elif name.startswith("block_table."):
            values[name] = torch.tensor([[1, 0]], dtype=torch.int32)
        elif name and node.meta["kind"] == "kv":
            _, two, num_heads, _, size = node.meta["spec"].shape
            dtype = node.meta["spec"].dtype
            empty = torch.full((2, two, num_heads, block, size), -1 if dtype == torch.int8 else torch.nan)
            values[name] = empty.to(dtype)
    return values
