"""The rules of `canonicalise` end: each makes one measure of the graph smaller, which cannot fall for ever."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.graph.edit import output_node
from tritium.graph.spec import args_of, has_spec, spec_of
from tritium.passes.canonicalise import CAST, RULES, _calls, canonicalise
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.leading_ones import num_leading_ones
from tritium.passes.views import canonicalise_views
from tritium.testing.graphs import evaluate, graph_of

aten = torch.ops.aten
VIEW, PERMUTE, SLICE, CAT = aten.view.default, aten.permute.default, aten.slice.Tensor, aten.cat.default
LARGE = 32  # more than a few ranks


def sunk(node: fx.Node, before: int) -> int:
    """What a node is worth by the values of its inputs, added: less when permutations and sizes of 1 stand lower.

    A view is worth nothing of its own. What sinks adds a number, what it passes multiplies; and a cast multiplies by
    less than the slices and concatenations that it passes.
    """
    if node.target is VIEW:
        return before
    ones = num_leading_ones(spec_of(node).shape)
    if node.target is PERMUTE:
        return before + LARGE + ones
    if node.target is CAST:
        return 2 * before + LARGE + ones
    return (4 if node.target in (SLICE, CAT) else 2) * before + 1 + ones


def ordered(node: fx.Node, before: int) -> int:
    """The same for casts, which pass views but not those that only put sizes of 1 in front; and for views of views."""
    if node.target is VIEW and without_ones(node) != without_ones(args_of(node)[0]):
        return 3 * before + 1
    return before + 1


def without_ones(node: fx.Node) -> tuple[object, ...]:
    return spec_of(node).shape[num_leading_ones(spec_of(node).shape) :]


def over_outputs(graph: fx.Graph, worth) -> int:
    """The worth of all outputs, by that of their inputs; a placeholder's is 1."""
    values: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = 1
        elif node.op == "call_function":
            values[node] = worth(node, sum(values[n] for n in read_by(node)))
    return sum(values[n] for n in read_by(output_node(graph)))


def read_by(node: fx.Node) -> list[fx.Node]:
    """The inputs, one that is read twice twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def widths_of_broadcast_views(graph: fx.Graph) -> int:
    """The ranks of views that an op with several tensors reads: such views become narrower."""
    calls = [n for n in graph.nodes if n.op == "call_function" and sum(has_spec(a) for a in args_of(n)) > 1]
    return sum(spec_of(a).rank for n in calls for a in args_of(n) if has_spec(a) and a.target is VIEW)


def measure(graph: fx.Graph) -> tuple[int, int, int]:
    return over_outputs(graph, sunk), widths_of_broadcast_views(graph), over_outputs(graph, ordered)


def assert_every_rule_lowers_the_measure(graph: fx.Graph) -> None:
    _calls(graph)
    while canonicalise_views(graph).num_matches:  # the first time it writes other spellings, which the measure ignores
        pass
    is_moving = True
    while is_moving:
        is_moving = False
        for rule in RULES:
            remove_dead_code(graph)
            before = measure(graph)
            if rule(graph).num_matches:
                is_moving = True
                remove_dead_code(graph)
                assert measure(graph) < before, f"{rule.__name__} may go on for ever:\n{graph}"


CYCLES = {
    "a cast of a batch of one": lambda a, b: a[None, None].to(torch.bfloat16),
    "a batch of one of a cast": lambda a, b: a.to(torch.bfloat16)[None, None],
    "a cast between two reshapes": lambda a, b: a[None].to(torch.bfloat16).view(1, -1, 2, 6),
    "a product of a batch of one": lambda a, b: (
        b[None, :, None].float() @ a[:, 0].to(torch.bfloat16)[None, None].float()
    ),
    "permuted batches of one": lambda a, b: (a[None].transpose(1, 2).to(torch.bfloat16) * 2.0)[:, 1:][:, :, None],
}


@pytest.mark.parametrize("name", CYCLES)
def test_what_could_be_moved_to_and_fro_comes_to_rest_with_its_value(name: str) -> None:
    example = [torch.randn(8, 12), torch.randn(12)]
    graph = graph_of(CYCLES[name], example, is_canonical=False)
    assert_every_rule_lowers_the_measure(graph)
    (result,) = evaluate(graph, dict(zip("ab", example, strict=True)))
    torch.testing.assert_close(result, CYCLES[name](*example), rtol=0, atol=0)


STEPS = (
    "transpose", "flatten", "split", "cut", "join", "add", "scale", "cast", "batch", "unbatch", "repeat", "mean",
)  # fmt: skip


def run_program(steps: list[tuple[str, int]], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A random walk through views and element-wise ops; a step that does not fit the shape is left out.

    The helper knows the tokens by their number: no step may make another size of 8, or merge the tokens with another.
    """
    a = a * 1.0
    for step, n in steps:
        before = a
        rank = a.dim()
        last = a.shape[-1]
        if step == "transpose" and rank > 1:
            a = a.transpose(n % rank, (n + 1) % rank)
        elif step == "flatten" and rank > 2:
            a = a.flatten(-2)
        elif step == "split" and last % 2 == 0 and rank < 5:
            a = a.unflatten(-1, (2, last // 2) if n % 2 else (last // 2, 2))
        elif step == "cut" and last > 2:
            a = a[..., n % 2 : last - 1]
        elif step == "join":
            a = torch.cat((a * 2.0, a) if n % 2 else (a, a), -1)
        elif step == "add" and last == b.shape[-1]:
            a = a + b if n % 2 else b.to(a.dtype)[None] * a
        elif step == "scale":
            a = a * (a + float(n)) if n % 2 else -a
        elif step == "cast":
            a = a.to(torch.bfloat16 if n % 2 else torch.float32)
        elif step == "batch" and rank < 5:
            a = a.unsqueeze(n % (rank + 1))
        elif step == "unbatch":
            a = a.squeeze()
        elif step == "repeat" and rank < 5:
            a = a.unsqueeze(-2).expand(*a.shape[:-1], 3, last)
        elif step == "mean":
            a = a * a.mean(-1, keepdim=True)
        if list(a.shape).count(8) != 1:
            a = before
    return a


class SumsInOneOrder(TorchDispatchMode):
    """Means add up rows that lie in memory: torch's own order follows the strides, which a normal form may change.

    The mean over the columns of an 8 x 12 matrix and of the same matrix transposed into memory differ by 6e-8.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.mean.dim:
            value, (dim,), is_kept = args
            mean = func(value.movedim(dim, -1).contiguous(), [-1], True).movedim(-1, dim)
            return mean if is_kept else mean.squeeze(dim)
        return func(*args, **(kwargs or {}))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5)), min_size=1, max_size=9))
def test_random_programs_come_to_rest_with_their_results_in_a_normal_form_that_stays(
    steps: list[tuple[str, int]],
) -> None:
    torch.manual_seed(0)
    example = [torch.randn(8, 12), torch.randn(12)]
    graph = graph_of(lambda a, b: run_program(steps, a, b), example, is_canonical=False)
    assert_every_rule_lowers_the_measure(graph)
    with SumsInOneOrder():
        expected = run_program(steps, *example)
        (result,) = evaluate(graph, dict(zip("ab", example, strict=True)))
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert canonicalise(graph).num_matches == 0
