"""The matcher, on patterns of its own."""

import torch
import torch.nn.functional as F
from torch import fx

from tritium.graph.match import Match, Pattern, find
from tritium.testing.graphs import calls, graph_of


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (8, 6), dtype=dtype)


def matches(pattern: Pattern, graph: fx.Graph) -> list[Match]:
    found = [find(pattern, node) for node in graph.nodes if node.op == "call_function"]
    return [match for match in found if match is not None]


def pattern(fn, *example, sentinels=None, is_elementwise=False) -> Pattern:
    return Pattern(graph_of(fn, example), sentinels=sentinels or {}, is_elementwise=is_elementwise)


def test_arguments_of_commutative_ops_may_be_swapped():
    p = pattern(lambda a, b: torch.sigmoid(a) * b, x(), x())
    graph = graph_of(lambda a, b: b * torch.sigmoid(a), (x(), x()))
    (match,) = matches(p, graph)
    assert {name: node.meta["name"] for name, node in match.bound(p).items()} == {"a": "a", "b": "b"}


def test_arguments_of_other_ops_may_not():
    p = pattern(lambda a, b: torch.sigmoid(a) - b, x(), x())
    assert not matches(p, graph_of(lambda a, b: b - torch.sigmoid(a), (x(), x())))


def test_a_wrong_order_that_fails_late_is_taken_back():
    p = pattern(lambda a, b: (a * b) * torch.tanh(a), x(), x())
    graph = graph_of(lambda a, b: torch.tanh(a) * (b * a), (x(), x()))
    (match,) = matches(p, graph)
    assert match.bound(p)["a"].meta["name"] == "a"


def test_one_input_of_the_pattern_is_one_value_of_the_graph():
    p = pattern(lambda a: a * torch.sigmoid(a), x())
    assert len(matches(p, graph_of(lambda a, b: a * torch.sigmoid(a), (x(), x())))) == 1
    assert not matches(p, graph_of(lambda a, b: b * torch.sigmoid(a), (x(), x())))


def test_a_sentinel_stands_for_any_number_but_the_same_everywhere():
    p = pattern(lambda a: (a + 1.25) * torch.tanh(a + 1.25), x(), sentinels={1.25: "shift"})
    (match,) = matches(p, graph_of(lambda a: (a + 0.5) * torch.tanh(a + 0.5), (x(),)))
    assert match.attributes == {"shift": 0.5}
    two = pattern(lambda a: (a + 1.25) * torch.tanh(a * 1.25), x(), sentinels={1.25: "shift"})
    assert not matches(two, graph_of(lambda a: (a + 0.5) * torch.tanh(a * 0.25), (x(),)))


def test_other_literals_must_be_equal():
    p = pattern(lambda a: a + 2.0, x())
    assert len(matches(p, graph_of(lambda a: a + 2, (x(),)))) == 1
    assert not matches(p, graph_of(lambda a: a + 3.0, (x(),)))


def test_a_cast_in_another_place_is_another_graph():
    bf16 = torch.bfloat16
    p = pattern(lambda a, w: a.float().tanh().to(bf16) * w, x(dtype=bf16), x(6, dtype=bf16))
    late = graph_of(lambda a, w: (a.float().tanh() * w).to(bf16), (x(dtype=bf16), x(6, dtype=bf16)))
    assert not matches(p, late)
    assert not matches(p, graph_of(lambda a, w: a.tanh() * w, (x(dtype=bf16), x(6, dtype=bf16))))
    assert len(matches(p, graph_of(lambda a, w: w * a.type(torch.float32).tanh().bfloat16(),
                                   (x(dtype=bf16), x(6, dtype=bf16))))) == 1  # fmt: skip


def test_sizes_differ_but_correspond():
    def halves(a: torch.Tensor) -> torch.Tensor:
        half = a.shape[-1] // 2
        return torch.cat((-a[..., half:], a[..., :half]), dim=-1)

    def thirds(a: torch.Tensor) -> torch.Tensor:
        third = a.shape[-1] // 3
        return torch.cat((-a[..., third:], a[..., :third]), dim=-1)

    p = pattern(halves, x(8, 3, 12))
    assert len(matches(p, graph_of(halves, (x(8, 5, 64),)))) == 1
    assert not matches(p, graph_of(thirds, (x(8, 5, 66),)))


def test_values_inside_a_match_may_have_users_outside():
    p = pattern(lambda a, b: F.silu(a) * b, x(), x())

    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        gate = F.silu(a)
        return gate * b + gate

    assert len(matches(p, graph_of(fn, (x(), x())))) == 1


def test_patterns_may_have_several_outputs():
    def residual(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = a + b
        return torch.tanh(total) * 2.0, total

    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = b + a
        return torch.tanh(total) * 2.0 + total

    p = pattern(residual, x(), x())
    (match,) = matches(p, graph_of(model, (x(), x())))
    first, second = (match.nodes[output] for output in p.outputs)
    assert first.args[0].target is torch.ops.aten.tanh.default
    assert second.target is torch.ops.aten.add.Tensor and second in first.args[0].all_input_nodes


def test_an_output_that_is_no_operand_of_the_first_is_found_among_the_users():
    def both(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = a * 2.0
        return angle.cos(), angle.sin()

    p = pattern(both, x())
    (match,) = matches(p, graph_of(lambda a: (a * 2.0).sin() + (a * 2.0).cos(), (x(),)))
    assert [match.nodes[output].target for output in p.outputs] == [
        torch.ops.aten.cos.default,
        torch.ops.aten.sin.default,
    ]
    assert not matches(p, graph_of(lambda a: (a * 2.0).cos() + (a * 3.0).sin(), (x(),)))


def test_leading_dimensions_are_like_the_tokens_only_where_the_pattern_says_so():
    def mean(a: torch.Tensor) -> torch.Tensor:
        return a * a.mean(-1, keepdim=True)

    per_head = graph_of(mean, (x(8, 5, 6),))
    assert len(matches(pattern(mean, x(8, 12), is_elementwise=True), per_head)) == 1
    assert not matches(pattern(mean, x(8, 12)), per_head)


def test_helpers_see_what_the_graph_calls():
    assert calls(graph_of(lambda a: F.silu(a).view(-1, 2, 3), (x(),))) == ["aten.silu"]
