"""recognise and its relatives: plain torch becomes our ops, whatever its sizes and attributes, where it is equal."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritium import ops
from tritium.graph.capture import capture
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_duplicates
from tritium.passes.recognise import recognise
from tritium.passes.recognise_attention import read_shared_heads, recognise_attention
from tritium.passes.recognise_products import recognise_products
from tritium.passes.recognise_rotary import recognise_rotary
from tritium.testing.graphs import calls, check_pass, evaluate, graph_of

bf16 = torch.bfloat16
SPELLINGS = [(op, spelling) for op in ops.OPS for spelling in op.spellings if not op.is_fused]


@pytest.fixture(autouse=True)
def weights_tell_the_dtype(monkeypatch):
    """A function has no weights: try the patterns of both types."""
    monkeypatch.setattr("tritium.passes.recognise.dtypes", lambda graph: [torch.float32, bf16])


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (8, 6), dtype=dtype)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """The example with another last size: nothing may depend on the sizes of the pattern."""
    return torch.cat((tensor, tensor), -1) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize(("op", "spelling"), SPELLINGS, ids=[f"{op.name}-{s.name}" for op, s in SPELLINGS])
def test_every_spelling_is_recognised_with_other_sizes_and_attributes(op, spelling, dtype):
    attributes = {name: value * 1.5 for name, value in spelling.attributes.items()}
    names = list(inspect.signature(spelling.fn).parameters)
    kept = ("bias",) if op.name == "linear" else ()
    example = [t if name in kept else _widened(t) for name, t in zip(names, spelling.example(dtype), strict=False)]

    def fn(*tensors):
        return spelling.fn(*tensors, **attributes)

    fn.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names[: len(example)]]
    )
    graph = graph_of(fn, example)
    if op.name == "attention":
        recognise_attention(graph)
        canonicalise(graph)
    recognise(graph)
    (call,) = [node for node in graph.nodes if getattr(node.target, "namespace", "") == "tritium"]
    assert calls(graph) == [op.name]
    found = dict(zip([a.name for a in call.target._schema.arguments], call.args, strict=False))
    binds = dict(spelling.binds) if dtype == bf16 else {}  # in fp32 there is no cast to have a place
    for name, value in (attributes | binds).items():
        assert found[name] == value
    values = dict(zip(names, example, strict=False))
    (result,) = evaluate(graph, values)
    expected = fn(*example)
    bound = max(2 * spelling.bound, spelling.fp32_bound) * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(result, expected, rtol=0, atol=bound)


def rms_norm(a, w, eps=1e-5):
    h = a.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(a.dtype) * w


NEAR_MISSES = {
    "rms_norm over the heads": lambda a, w: rms_norm(a.view(-1, 3, 2).transpose(1, 2), w[:3]),
    "rms_norm that casts before the root is taken": lambda a, w: (
        (a.float() * torch.rsqrt(a.float().pow(2).mean(-1, keepdim=True) + 1e-5).to(bf16).float()).to(bf16) * w
    ),
    "rms_norm with a cube": lambda a, w: a * torch.rsqrt(a.pow(3).mean(-1, keepdim=True) + 1e-5) * w,
    "rms_norm of another value": lambda a, w: a * torch.rsqrt((a + a).pow(2).mean(-1, keepdim=True) + 1e-5) * w,
    "rms_norm in bf16": lambda a, w: a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-5) * w,
    "an activation of half the input": lambda a, w: a * torch.sigmoid(a * 0.5) * w,
    "a gate cast before its activation": lambda a, w: F.silu(a.float()) * w.float(),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_only_looks_like_an_op_is_left_alone(name):
    graph = graph_of(NEAR_MISSES[name], [x(dtype=bf16), x(6, dtype=bf16)])
    recognise(graph)
    found = set(calls(graph)) & {op.name for op in ops.OPS}
    assert not found & {"rms_norm", "gated_activation"}, graph


def test_recognise_obeys_the_rules_of_a_pass():
    def block(a, w, v):
        h = rms_norm(a, w)
        return a + F.linear(F.silu(F.linear(h, v)) * F.linear(h, v * 2.0), v.t())

    graph = check_pass(recognise, block, [x(), x(6), x(10, 6)], matches=5, tolerance=1e-5)
    assert calls(graph) == ["rms_norm", "linear", "aten.mul.Tensor", "linear", "gated_activation", "linear",
                            "aten.add.Tensor"]  # fmt: skip


def test_a_value_inside_an_op_that_others_read_is_kept():
    def fn(a, b):
        gate = F.silu(a)
        return gate * b + gate

    graph = check_pass(recognise, fn, [x(), x()], matches=2, tolerance=1e-6)
    assert sorted(calls(graph)) == ["activation", "aten.add.Tensor", "gated_activation"]


def test_ops_in_a_row_are_all_recognised():
    graph = check_pass(recognise, lambda a, w: rms_norm(rms_norm(rms_norm(a, w), w), w), [x(), x(6)], matches=3)
    assert calls(graph) == ["rms_norm"] * 3


def test_a_norm_of_each_head_is_a_norm():
    graph = check_pass(recognise, lambda a, w: rms_norm(a.view(-1, 2, 3), w), [x(), x(3)], matches=1)
    assert calls(graph) == ["rms_norm"]


def test_an_op_covers_the_calls_it_stands_for():
    graph = check_pass(recognise, rms_norm, [x(dtype=bf16), x(6, dtype=bf16)], matches=1)
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    assert {"pow_1", "mean", "rsqrt"} <= set(node.meta["covers"])
    assert node.meta["source"].place


def test_linears_written_as_products_are_recognised():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b, self.v = (nn.Parameter(torch.randn(*shape)) for shape in ((12, 5), (5,), (7, 5)))
            self.embed = nn.Embedding(50, 12)

        def forward(self, input_ids, positions):
            h = torch.addmm(self.b, self.embed(input_ids), self.w)
            return h @ self.v.t() + torch.matmul(h[None], self.v.mT)[0]

    module = Products()
    graph = capture(module).graph
    canonicalise(graph)
    assert recognise_products(graph).num_matches == 3
    assert recognise_products(graph).num_matches == 0
    assert calls(graph).count("linear") == 3
    ids = torch.arange(8)
    (result,) = evaluate(graph, {**dict(module.named_parameters()), "input_ids": ids, "positions": ids})
    torch.testing.assert_close(result, module(ids, ids))


def test_products_of_tokens_are_no_linears():
    check_pass(recognise_products, lambda a, b: (a @ b.t()) @ b, [x(), x()], matches=0)


def attend(q, k, v, **more):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **more)


ATTENTIONS = {
    "heads first": lambda q, k, v: attend(*(a.transpose(0, 1) for a in (q, k, v))).transpose(0, 1),
    "a batch of one": lambda q, k, v: attend(*(a.transpose(0, 1)[None] for a in (q, k, v)))[0].transpose(0, 1),
    "a batch moved late": lambda q, k, v: attend(*(a[None].transpose(1, 2) for a in (q, k, v))).transpose(1, 2)[0],
    "a scale": lambda q, k, v: attend(*(a.transpose(0, 1) for a in (q, k, v)), scale=0.3).transpose(0, 1),
}
GROUPED = {
    "enable_gqa": lambda q, k, v: attend(*(a.transpose(0, 1) for a in (q, k, v)), enable_gqa=True).transpose(0, 1),
    "repeat_interleave before": lambda q, k, v: attend(
        *(a.transpose(0, 1) for a in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, dim=1)))
    ).transpose(0, 1),
    "repeat_interleave after": lambda q, k, v: attend(
        q.transpose(0, 1), *(a.transpose(0, 1).repeat_interleave(3, 0) for a in (k, v))
    ).transpose(0, 1),
    "expand and reshape": lambda q, k, v: attend(
        q.transpose(0, 1)[None],
        *(a.transpose(0, 1)[None, :, None].expand(1, 2, 3, 8, 4).reshape(1, 6, 8, 4) for a in (k, v)),
    )[0].transpose(0, 1),
}


def recognise_heads(graph):
    result = recognise_attention(graph)
    canonicalise(graph)
    read_shared_heads(graph)
    return result


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_recognised_in_every_layout(name):
    example = [x(8, 6, 4), x(8, 6, 4), x(8, 6, 4)]
    graph = check_pass(recognise_heads, ATTENTIONS[name], example, matches=1, tolerance=1e-5)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [torch.ops.tritium.attention.default]


@pytest.mark.parametrize("name", GROUPED)
def test_shared_kv_heads_are_not_repeated(name):
    example = [x(8, 6, 4), x(8, 2, 4), x(8, 2, 4)]
    graph = check_pass(recognise_heads, GROUPED[name], example, matches=1, tolerance=1e-5)
    (attention,) = [n for n in graph.nodes if n.target is torch.ops.tritium.attention.default]
    assert attention.args[1].op == attention.args[2].op == "placeholder"


def test_heads_repeated_in_another_order_are_left_alone():
    def tiled(q, k, v):
        return attend(q.transpose(0, 1), *(torch.cat((a, a, a), 1).transpose(0, 1) for a in (k, v))).transpose(0, 1)

    def swapped(q, k, v):
        k, v = (a[:, None].expand(8, 3, 2, 4).reshape(8, 6, 4).transpose(0, 1) for a in (k, v))
        return attend(q.transpose(0, 1), k, v).transpose(0, 1)

    for fn in (tiled, swapped):
        graph = check_pass(recognise_heads, fn, [x(8, 6, 4), x(8, 2, 4), x(8, 2, 4)], matches=1, tolerance=1e-5)
        (attention,) = [n for n in graph.nodes if n.target is torch.ops.tritium.attention.default]
        assert attention.args[1].op != "placeholder"


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(q[0] @ k[0].t()) > 0),
        lambda q, k, v: attend(q.reshape(2, 3, 8, 4), k.reshape(2, 3, 8, 4), v.reshape(2, 3, 8, 4)),
    ],
    ids=["to the future", "with dropout", "masked", "a batch of two"],
)
def test_other_attention_is_left_alone(fn):
    check_pass(recognise_attention, fn, [x(6, 8, 4), x(6, 8, 4), x(6, 8, 4)], matches=0, tolerance=None)


def rotary(cos_of, rotate):
    """The rotary embedding of x [T, N, H] with cos and sin as a model computes them."""

    def fn(a, positions, inv_freq):
        cos, sin = cos_of(positions, inv_freq, a.dtype)
        return rotate(a, cos, sin)

    return fn


def rotate_half(a):
    first, second = a.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def angles_twice(positions, inv_freq, dtype):
    angles = positions[:, None].float() * inv_freq[None, :]
    both = torch.cat((angles, angles), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def angles_by_outer(positions, inv_freq, dtype):
    angles = torch.outer(positions.to(torch.float32), inv_freq)
    both = torch.cat((angles, angles), dim=-1)
    return (both.cos() * 0.8).to(dtype), (both.sin() * 0.8).to(dtype)


def angles_once(positions, inv_freq, dtype):
    angles = positions.float()[:, None] * inv_freq
    return torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([angles.sin()] * 2, -1).to(dtype)


def tokens_first(a, cos, sin):
    return a * cos[:, None] + rotate_half(a) * sin[:, None]


def heads_first(a, cos, sin):
    a = a.transpose(0, 1)
    return (a * cos + rotate_half(a) * sin).transpose(0, 1)


def heads_first_in_a_batch(a, cos, sin):
    a, cos, sin = a[None].transpose(1, 2), cos[None, None], sin[None, None]
    return ((a * cos) + (rotate_half(a) * sin)).transpose(1, 2)[0]


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize("rotate", [tokens_first, heads_first, heads_first_in_a_batch])
@pytest.mark.parametrize("cos_of", [angles_twice, angles_by_outer, angles_once])
def test_rotary_embeddings_are_recognised_from_positions_on(cos_of, rotate, dtype):
    def run(graph):
        result = recognise_rotary(graph)
        canonicalise(graph)
        remove_duplicates(graph)
        recognise(graph)
        canonicalise(graph)
        return result

    example = [x(8, 3, 12, dtype=dtype), torch.arange(8) * 3, torch.rand(6)]
    graph = graph_of(rotary(cos_of, rotate), example)
    values = dict(zip(("a", "positions", "inv_freq"), example, strict=True))
    (before,) = evaluate(graph, values)
    assert run(graph).num_matches == 2
    assert set(calls(graph)) == {"rope_cos_sin", "rope"}
    (after,) = evaluate(graph, values)
    torch.testing.assert_close(after, before, rtol=0, atol=4 * torch.finfo(dtype).eps * before.abs().max().item())
    assert run(graph).num_matches == 0


def test_rotary_angles_obey_the_rules_of_a_pass():
    def fn(positions, inv_freq):
        cos, sin = angles_by_outer(positions, inv_freq, torch.float32)
        return cos + sin + (positions.float()[:, None] * inv_freq).cos().sum(-1, keepdim=True)

    graph = check_pass(recognise_rotary, fn, [torch.arange(8), torch.rand(6)], matches=3)
    scalings = {n.args[2] for n in graph.nodes if n.target is torch.ops.tritium.rope_cos_sin.default}
    assert scalings == {0.8, 1.0}


def test_cosines_of_other_things_are_left_alone():
    check_pass(recognise_rotary, lambda a: a.cos() + a.sin(), [x()], matches=0)
