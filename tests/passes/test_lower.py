"""lower: values, steps and views of a plan, and the copies that views need."""

import pytest
import torch

from tritium import ops
from tritium.engine.plan import Extent, Plan, Sizes
from tritium.engine.views import view_of
from tritium.errors import CaptureError
from tritium.graph.grammar import verify
from tritium.passes.gather_rows import gather_sampled_rows
from tritium.passes.lower import lower
from tritium.testing.graphs import graph_of

ROWS = torch.tensor([1, 4, 5, 7, 0, 2, 3, 6])
SIZES = Sizes(tokens=8, sequences=1, rows=8)


def lowered(fn, *example: torch.Tensor) -> Plan:
    graph = graph_of(fn, example)
    gather_sampled_rows(graph)
    verify(graph)
    return lower(graph, ())


def interpret(plan: Plan, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a plan naively: every temporary dense, every view a real view."""
    values = dict(inputs)

    def value(name: str) -> torch.Tensor:
        if name not in values:
            v = plan.value(name)
            assert v.kind == "view", f"{name} is read before it is written"
            values[name] = view_of(value(v.base), v.op, v.args, SIZES)
            assert list(values[name].shape) == [Extent.parse(dim).at(SIZES) for dim in v.shape]
        return values[name]

    for step in plan.steps:
        namespace, _, rest = step.op.partition(".")
        name, _, overload = rest.partition(".")
        target = getattr(getattr(torch.ops.aten, name), overload) if namespace == "aten" else ops.target(step.op)
        positional = [value(a.value) if hasattr(a, "value") else [value(i.value) for i in a] if isinstance(a, list)
                      and a and hasattr(a[0], "value") else getattr(torch, a) if a in ("float32", "bfloat16") else a
                      for a in step.args.values()]  # fmt: skip
        keywords = {a.name: p for a, p in zip(target._schema.arguments, positional, strict=True) if a.kwarg_only}
        result = target(*positional[: len(positional) - len(keywords)], **keywords).contiguous()
        assert list(result.shape) == [Extent.parse(dim).at(SIZES) for dim in plan.value(step.outputs[0]).shape]
        values[step.outputs[0]] = result
    return value(plan.output)


def check(fn, *example: torch.Tensor) -> Plan:
    """The plan computes what the function does for the sampled rows."""
    plan = lowered(fn, *example)
    names = [v.name for v in plan.values if v.kind == "input" and v.name != "sampled_rows"]
    result = interpret(plan, dict(zip(names, example, strict=True)) | {"sampled_rows": ROWS})
    torch.testing.assert_close(result, fn(*example)[ROWS], rtol=1e-5, atol=1e-5)
    return plan


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (8, 12), dtype=dtype)


def test_element_wise_ops_are_steps_with_every_argument_named():
    plan = check(lambda a, b: (a + b * 2.0).to(torch.bfloat16).float(), x(), x())
    assert [s.op for s in plan.steps] == ["gather_rows", "gather_rows", "aten.mul.Tensor", "aten.add.Tensor",
                                          "aten.to.dtype", "aten.to.dtype"]  # fmt: skip
    assert plan.steps[3].args["alpha"] == 1
    assert plan.steps[4].args["dtype"] == "bfloat16"
    assert all(s.phase == "rows" for s in plan.steps)


def test_views_cost_no_step():
    plan = check(lambda a: torch.relu(a.view(-1, 3, 4).transpose(1, 2)[:, 1:]).sum(-1), x())
    assert [s.op for s in plan.steps] == ["gather_rows", "aten.relu.default", "aten.sum.dim_IntList"]
    assert [v.op for v in plan.values if v.kind == "view"] == ["aten.view", "aten.slice", "aten.permute"]


def test_flattening_a_transposed_value_copies_it():
    plan = check(lambda a: torch.relu(a.view(-1, 3, 4).transpose(1, 2).flatten(1)), x())
    assert sorted(s.op for s in plan.steps) == ["aten.clone.default", "aten.relu.default", "gather_rows"]


def test_flattening_an_expanded_value_copies_it():
    plan = check(lambda a: torch.relu(a.view(-1, 3, 4).repeat_interleave(2, 1).flatten(1)), x())
    assert "aten.clone.default" in [s.op for s in plan.steps]


def test_lists_of_values_are_lists_of_references():
    plan = check(lambda a, b: torch.cat((a, b[:, :3]), -1), x(), x())
    (cat,) = [s for s in plan.steps if s.op == "aten.cat.default"]
    assert [ref.value for ref in cat.args["tensors"]] == ["gather_rows", "slice_1"] or len(cat.args["tensors"]) == 2


def test_token_steps_come_before_row_steps():
    def fn(a):
        heads = (a * 2.0).view(-1, 3, 4)
        return ops.attention(heads, heads, heads, 0.5).flatten(1) + a

    graph = graph_of(fn, [x()])
    gather_sampled_rows(graph)
    phases = [step.phase for step in lower(graph, ()).steps]
    assert phases == ["tokens", "tokens", "rows", "rows", "rows"]


def test_logits_of_another_shape_are_refused():
    with pytest.raises(CaptureError, match=r"must return logits \[T, V\], not float32\[R, 3, 4\]"):
        lowered(lambda a: a.view(-1, 3, 4) + 1.0, x())
    with pytest.raises(CaptureError, match="must return exactly one tensor"):
        lowered(lambda a: (a + 1.0, a * 2.0), x())


def test_sources_name_the_captured_calls():
    plan = lowered(lambda a: torch.relu(a) * 2.0, x())
    assert [s.sources for s in plan.steps] == [(), ("relu",), ("mul",)]
