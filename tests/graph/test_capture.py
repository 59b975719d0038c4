"""Capture: what a module becomes, what stays as it was, what is said when it cannot be."""

import json
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch import nn

from tritium.engine.plan import Extent
from tritium.errors import CaptureError
from tritium.graph import dump
from tritium.graph.annotate import fixed_sizes, symbolic_sizes
from tritium.graph.capture import capture
from tritium.graph.conditions import holds_for_every_length
from tritium.graph.infer import infer
from tritium.graph.spec import IRREGULAR, NUM_TOKENS, Spec, spec_of
from tritium.testing.plain_models import PlainLlama


def placeholders(graph) -> dict[str, torch.fx.Node]:
    return {node.meta["name"]: node for node in graph.nodes if node.op == "placeholder"}


class Small(nn.Module):
    """An embedding, `body`, a head that may be tied."""

    def __init__(self, body=lambda x, positions: x, *, is_tied: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.body = nn.Embedding(50, 12), nn.Linear(12, 50, bias=False), body
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.arange(12.0, device="cpu"))
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, positions):
        return self.head(self.drop(self.body(self.embed(input_ids) * self.scale, positions)))


def test_inputs_parameters_and_buffers_become_placeholders_by_name():
    captured = capture(Small())
    found = placeholders(captured.graph)
    assert {n: node.meta["kind"] for n, node in found.items()} == {
        "embed.weight": "weight",
        "head.weight": "weight",
        "scale": "weight",
        "input_ids": "input",
        "positions": "input",
    }
    assert spec_of(found["input_ids"]) == Spec(torch.int64, (NUM_TOKENS,))
    assert spec_of(found["head.weight"]) == Spec(torch.float32, (50, 12))
    torch.testing.assert_close(captured.constants["scale"], torch.arange(12.0))


def test_the_module_is_left_as_it_was():
    module = Small(is_tied=True).train()
    module.drop.eval()
    before = {name: (id(p), p.requires_grad) for name, p in module.named_parameters()}
    capture(module, dtype=torch.bfloat16)
    assert {name: (id(p), p.requires_grad) for name, p in module.named_parameters()} == before
    assert module.head.weight is module.embed.weight
    assert module.training and module.head.training and not module.drop.training


def test_the_module_is_left_as_it_was_after_an_error():
    module = Small(lambda x, positions: x.numpy()).train()
    weight = module.head.weight
    with pytest.raises(CaptureError):
        capture(module)
    assert module.head.weight is weight and module.training


def test_parameters_are_taken_in_the_wanted_type_and_buffers_kept():
    found = placeholders(capture(Small(), dtype=torch.bfloat16).graph)
    assert spec_of(found["head.weight"]).dtype == torch.bfloat16
    assert spec_of(found["scale"]).dtype == torch.float32


def test_tied_weights_are_one_weight():
    graph = capture(Small(is_tied=True)).graph
    assert sum(bool(n.users) for n in placeholders(graph).values() if n.meta["kind"] == "weight") == 2


def test_a_meta_module_of_any_size_is_captured_without_memory():
    with torch.device("meta"):
        module = PlainLlama(vocab_size=200_000, size=16_384, num_layers=1, num_heads=128, num_kv_heads=8, head_size=128)
    assert spec_of(placeholders(capture(module).graph)["head.weight"]).shape == (200_000, 16_384)


def test_calls_know_their_module_and_their_line():
    graph = capture(PlainLlama()).graph
    sources = {node.meta["source"].module: node.meta["source"] for node in graph.nodes if node.op == "call_function"}
    assert sources["layers.1.norm_2"].place.startswith("plain_models.py:")
    assert "self.weight * h.to(x.dtype)" in {n.meta["source"].code.removeprefix("return ") for n in graph.nodes
                                             if n.op == "call_function"}  # fmt: skip


REFUSED = {
    "control flow on values": (lambda x, p: x if x.sum() > 0 else -x, "Control flow in forward() may not depend"),
    "numpy": (lambda x, p: torch.from_numpy(x.numpy()), "numpy"),
    "tensors of another device": (
        lambda x, p: x * torch.tensor([2.0] * 12),
        "register it as a buffer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_cannot_export_is_refused_with_advice(name):
    body, advice = REFUSED[name]
    with pytest.raises(CaptureError) as caught:
        capture(Small(body))
    assert "Small could not be captured" in str(caught.value) and advice in str(caught.value)


@pytest.mark.parametrize("body", [lambda x, p: x if x.shape[0] > 4 else -x, lambda x, p: x[:8]], ids=["branch", "cut"])
def test_code_for_some_lengths_only_is_a_restriction_that_names_it(body):
    captured = None
    try:
        captured = capture(Small(body))
        restriction = captured.restriction
    except CaptureError as error:
        restriction = error
    assert restriction is not None and "it must work for every length" in str(restriction)


def test_a_forward_of_another_signature_is_refused_with_the_expected_one():
    with pytest.raises(CaptureError, match=r"must take \(input_ids \[T\], positions \[T\]\)"):
        capture(nn.Linear(3, 4))


def test_sizes_are_linear_in_the_tokens_or_marked():
    tokens = sympy.Symbol("s0", positive=True, integer=True)
    read = symbolic_sizes(tokens)

    class Size:
        def __init__(self, expr):
            self.node = self
            self.expr = expr

    assert read(5) == 5
    assert read(Size(tokens)) == NUM_TOKENS
    assert read(Size(3 * tokens + 2)) == Extent(tokens=3, constant=2)
    assert read(Size(tokens * tokens)) == IRREGULAR
    assert read(Size(tokens // 2)) == IRREGULAR
    assert fixed_sizes(8)(8) == NUM_TOKENS and fixed_sizes(8)(9) == 9


def test_the_dump_for_programs_is_json_with_every_call():
    graph = capture(Small()).graph
    nodes = json.loads(dump.to_json(graph))["nodes"]
    calls = [node for node in nodes if "op" in node]
    assert len(calls) == sum(node.op == "call_function" for node in graph.nodes)
    (linear,) = [node for node in calls if node["op"] == "aten.linear"]
    assert linear["type"] == "float32[T, 50]" and linear["args"]["weight"] == {"node": "head.weight"}
    assert linear["source"]["module"] == "head" and linear["covers"] == ["linear"]


def test_the_dump_for_people_says_what_is_not_default():
    text = dump.to_text(capture(Small()).graph)
    assert "weight scale: float32[12]" in text and "input input_ids: int64[T]" in text
    assert "[head]\n  linear: float32[T, 50] = aten.linear(dropout, head.weight)" in text
    assert "return linear" in text


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (lambda size: torch.sym_min(size * 16, size * 32) == size * 16, True),
        (lambda size: size * 3 >= size, True),
        (lambda size: size != 12, False),
        (lambda size: size > 4, False),
        (lambda size: size <= 4096, False),
    ],
    ids=["a true one that torch cannot prove", "a trivial one", "all but one", "long ones", "short ones"],
)
def test_conditions_that_hold_for_every_length_are_no_restriction(condition, holds):
    """Built by hand: which ones torch.export cannot prove depends on its version."""
    tokens = sympy.Symbol("s0", positive=True, integer=True)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = SimpleNamespace(shape=[SimpleNamespace(node=SimpleNamespace(expr=tokens)), 12])
    size = torch.fx.Proxy(graph.call_function(torch.ops.aten.sym_size.int, (x, 0)))
    graph.call_function(torch.ops.aten._assert_scalar.default, (condition(size).node, "message"))
    assert holds_for_every_length(graph, tokens) == holds


def test_a_condition_on_values_is_not_known_to_hold():
    tokens = sympy.Symbol("s0", positive=True, integer=True)
    graph = torch.fx.Graph()
    value = torch.fx.Proxy(graph.call_function(torch.ops.aten._local_scalar_dense.default, (graph.placeholder("x"),)))
    graph.call_function(torch.ops.aten._assert_scalar.default, ((value >= 0).node, "message"))
    assert not holds_for_every_length(graph, tokens)


def test_a_size_that_is_not_linear_in_the_tokens_is_refused_with_its_op_and_both_sizes():
    node = torch.fx.Graph().placeholder("x")
    node.meta["spec"] = Spec(torch.float32, (NUM_TOKENS, NUM_TOKENS))
    assert infer(torch.ops.aten.mul.Tensor, (node, 2.0), {}).shape == (NUM_TOKENS, NUM_TOKENS)
    with pytest.raises(CaptureError, match=r"aten\.flatten.*: a size of its result is 1018081 for 1009 tokens"):
        infer(torch.ops.aten.flatten.using_ints, (node,), {})
