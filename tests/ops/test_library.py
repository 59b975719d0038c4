"""The registration with torch: one node per op after export, fakes that tell the truth, references against oracles."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tritium import ops
from tritium.ops.fp8 import quantize_fp8
from tritium.ops.int8 import quantize_int8

T, N, K, H, D = 8, 6, 3, 16, 48


def _example_calls(dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments for each op, with strided inputs where models have them."""
    qkv = torch.randn(T, (N + 2 * K) * H, dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, H)) for x in qkv.split([N * H, K * H, K * H], dim=-1))
    positions, inv_freq = torch.arange(T), 1.0 / 10000.0 ** (torch.arange(6) / 6)
    cache = torch.zeros(4, 2, K, 4, H, dtype=dtype)
    counts = torch.tensor([1, T, 1, 0], dtype=torch.int32)
    x, experts = (
        torch.randn(T, D, dtype=dtype),
        (torch.randn(3, 20, D, dtype=dtype), torch.randn(3, D, 10, dtype=dtype)),
    )
    starts, lens = torch.tensor([0, T], dtype=torch.int32), torch.tensor([T], dtype=torch.int32)
    tables = torch.tensor([[1, 2]], dtype=torch.int32), starts, lens, counts
    kept = (torch.zeros(24, H, dtype=torch.int8), torch.ones(24, 1))
    return {
        "embedding": (positions, torch.randn(20, D, dtype=dtype)),
        "quantized_embedding": (positions, *kept, "bfloat16"),
        "linear": (torch.randn(T, D, dtype=dtype), torch.randn(24, D, dtype=dtype), None),
        "quantized_linear": (q, *kept, None, True),
        "quantized_linear_activation": (q, *kept, None, True, "silu"),
        "quantized_linear_gated": (q, *kept, None, False, "silu"),
        "quantized_linear_add": (q, *kept, None, True, torch.randn(T, N, 24, dtype=dtype)),
        "rms_norm": (q, torch.randn(H, dtype=dtype), 1e-5),
        "layer_norm": (q, torch.randn(H, dtype=dtype), None, 1e-5),
        "rope_cos_sin": (positions, inv_freq),
        "rope": (q, ops.rope_cos_sin(positions, inv_freq)),
        "activation": (q, "silu"),
        "gated_activation": (q, torch.randn(T, N, H, dtype=dtype), "silu"),
        "moe": (x, torch.randn(T, 3, dtype=dtype), *experts, 2, True, "silu"),
        "attention": (q, k, v, 0.25),
        "gather_rows": (torch.randn(T, D, dtype=dtype), torch.tensor([7, 0])),
        "kv_store": (k, v, cache, positions),
        "paged_attention": (q, cache, *tables, 0.25, 0, 0.0),
        "varlen_attention": (q, k, v, starts, counts, 0.25, 0.0),
        "add_rms_norm": (q, q * 2.0, torch.randn(H, dtype=dtype), 1e-5),
        "add_layer_norm": (q, q * 2.0, torch.randn(H, dtype=dtype), None, 1e-5),
        **{
            f"quantized_{name}": (*((q, q * 2.0) if "add" in name else (q,)), torch.randn(H, dtype=dtype), *last)
            for kind, last in (("rms_norm", (1e-5,)), ("layer_norm", (None, 1e-5)))
            for name in (kind, f"add_{kind}")
        },
        "linear_activation": (torch.randn(T, D, dtype=dtype), torch.randn(24, D, dtype=dtype), None, "relu"),
        "linear_gated": (torch.randn(T, D, dtype=dtype), torch.randn(24, D, dtype=dtype), None, "silu"),
        "linear_add": (x, torch.randn(24, D, dtype=dtype), None, torch.randn(T, 24, dtype=dtype)),
        "linear_pair": (x, x[:, :16], torch.randn(24, D + 16, dtype=dtype), torch.randn(24, dtype=dtype)),
        "experts": (
            torch.randn(T, D, dtype=dtype),
            torch.randint(0, 3, (T, 2)),
            torch.rand(T, 2),
            torch.randn(3, 20, D, dtype=dtype),
            torch.randn(3, D, 10, dtype=dtype),
            "silu",
        ),
        "rope_kv_store": (q, k, v, ops.rope_cos_sin(positions, inv_freq), cache, positions),
        "all_reduce": (x,),
        "all_gather": (x, 1),
        "embedding_part": (torch.arange(T), torch.randn(20, D, dtype=dtype), 3),
        **_row_calls("fp8", quantize_fp8, x),
        **_row_calls("int8", quantize_int8, x),
    }


def _row_calls(kept: str, quantize: Callable[..., tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> dict:
    """Of the ops that quantise rows; with a scale of their own and with a given one."""
    weight, scale = torch.randn(D, dtype=x.dtype), torch.tensor([0.02])
    linear = (*quantize(x), quantize(torch.randn(24, D))[0], torch.ones(1, 24), None, str(x.dtype)[6:])
    return {
        f"quantize_{kept}": (x, scale),
        f"linear_{kept}": linear,
        f"rms_norm_{kept}": (x, weight, 1e-5, 0.0, True),
        f"add_rms_norm_{kept}": (x, x * 2.0, weight, 1e-5, 0.0, True, scale),
        f"gated_activation_{kept}": (x, x * 2.0, "silu"),
        f"activation_{kept}": (x, x[0], "gelu"),
        f"activation_pair_{kept}": (x, x * 2.0, None, "gelu"),
        f"add_layer_norm_{kept}": (x, x * 2.0, x[0], weight, None, 1e-5),
    }


@pytest.mark.parametrize("name", [op.name for op in ops.OPS])
def test_a_fake_has_the_shape_dtype_and_strides_of_the_result(name: str) -> None:
    args = _example_calls(torch.bfloat16)[name]
    real = ops.target(name)(*args)
    fake = ops.target(name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    if name == "kv_store":
        assert real is None and fake is None
        return
    for real_one, fake_one in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True):
        assert fake_one.device.type == "meta"
        assert (fake_one.shape, fake_one.dtype, fake_one.stride()) == (
            *(real_one.shape, real_one.dtype),
            real_one.stride(),
        )


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(D, device="meta"))
        self.qkv = torch.nn.Parameter(torch.empty((N + 2 * K) * H, D, device="meta"))
        self.table = torch.nn.Parameter(torch.empty(20, D, device="meta"))
        self.register_buffer("inv_freq", torch.ones(H // 2))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = ops.rms_norm(ops.embedding(input_ids, self.table), self.weight, 1e-5, 1.0)
        qkv = ops.linear(x, self.qkv, None).unflatten(-1, (-1, H))
        q, k, v = qkv.split([N, K, K], dim=1)
        cos_sin = ops.rope_cos_sin(positions, self.inv_freq)
        return ops.attention(ops.rope(q, cos_sin), ops.rope(k, cos_sin), v, 0.25)


def test_export_leaves_one_node_per_op_with_a_symbolic_number_of_tokens() -> None:
    ids = torch.zeros(T, dtype=torch.int64, device="meta")
    tokens = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(_Model(), (ids, ids), dynamic_shapes=({0: tokens}, {0: tokens}), strict=False)
    nodes = [n for n in program.graph.nodes if str(n.target).startswith("tritium.")]
    names = [str(n.target).split(".")[1] for n in nodes]
    assert names == ["embedding", "rms_norm", "linear", "rope_cos_sin", "rope", "rope", "attention"]
    assert isinstance(nodes[-1].meta["val"].shape[0], torch.SymInt)


def test_an_unknown_op_or_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"rms_nrm.*known: embedding, linear"):
        ops.target("rms_nrm")
    with pytest.raises(ValueError, match=r"silu, gelu.*not 'swish'"):
        ops.activation(torch.zeros(2), "swish")


@pytest.mark.parametrize("has_alibi", [False, True])
@pytest.mark.parametrize(
    ("window", "softcap", "causal"), [(0, 0.0, True), (3, 0.0, True), (0, 2.0, True), (0, 0.0, False)]
)
def test_attention_equals_softmax_written_out_per_head(
    window: int, softcap: float, causal: bool, has_alibi: bool
) -> None:
    torch.manual_seed(0)
    slopes = torch.rand(N) if has_alibi else None
    q, k, v = (torch.randn(T, heads, H, dtype=torch.float64) for heads in (N, K, K))
    expected = torch.empty(T, N, H, dtype=torch.float64)
    for t in range(T):
        keys = range(max(0, t - window + 1) if window else 0, t + 1 if causal else T)
        for n in range(N):
            scores = torch.stack([q[t, n] @ k[s, n // (N // K)] for s in keys]) * 0.3
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            if slopes is not None:
                scores = scores + slopes[n].double() * torch.tensor([s - t for s in keys])
            expected[t, n] = sum(p * v[s, n // (N // K)] for p, s in zip(scores.softmax(0), keys, strict=True))
    out = ops.attention(q.float(), k.float(), v.float(), 0.3, causal, window, softcap, slopes)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_kv_store_then_paged_attention_equals_attention_of_each_sequence_and_reads_no_unwritten_slot() -> None:
    torch.manual_seed(0)
    block_size, lens, num_new = 4, (11, 6), (3, 6)
    q, k, v = ([torch.randn(length, heads, H) for length in lens] for heads in (N, K, K))
    storage = torch.full((8, 5, 2, K, block_size, H), math.nan)
    cache = storage[:, 2]
    table = torch.tensor([[3, 5, 1, 99], [7, 2, 99, 99]], dtype=torch.int32)
    for s in range(2):
        slots = torch.tensor([int(table[s, t // block_size]) * block_size + t % block_size for t in range(lens[s])])
        ops.kv_store(
            torch.cat((k[s], k[s][:1])), torch.cat((v[s], v[s][:1])), cache, torch.cat((slots, torch.tensor([-1])))
        )
    written = ~storage.isnan()
    assert (
        written[:, 2].any() and not written[:, [0, 1, 3, 4]].any() and int(written[:, 2, 0, 0, :, 0].sum()) == sum(lens)
    )
    packed = torch.cat([q[s][-num_new[s] :] for s in range(2)] + [torch.full((2, N, H), math.nan)])
    int32 = {"dtype": torch.int32}
    counts, starts = torch.tensor([2, 9, 2, 0], **int32), torch.tensor([0, 3, 9, 9], **int32)
    for window, slopes in ((0, None), (5, None), (0, torch.rand(N)), (5, torch.rand(N))):
        batch = (packed, cache, table, starts, torch.tensor(lens, **int32), counts)
        out = ops.paged_attention(*batch, 0.3, window, 0.0, slopes)
        expected = [ops.attention(q[s], k[s], v[s], 0.3, True, window, 0.0, slopes)[-num_new[s] :] for s in range(2)]
        torch.testing.assert_close(out[:9], torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_rope_rotates_by_complex_multiplication_and_leaves_the_rest() -> None:
    torch.manual_seed(0)
    x, positions, inv_freq = torch.randn(T, N, H), torch.arange(T) * 7, torch.rand(5)
    cos_sin = ops.rope_cos_sin(positions, inv_freq, 1.5)
    turn = torch.polar(
        torch.full((T, 1, 5), 1.5, dtype=torch.float64), (positions[:, None].double() * inv_freq)[:, None]
    )
    halves = torch.complex(x[..., :5].double(), x[..., 5:10].double()) * turn
    pairs = torch.view_as_complex(x[..., :10].double().unflatten(-1, (5, 2)).contiguous()) * turn
    expected = torch.cat((halves.real, halves.imag, x[..., 10:].double()), -1)
    torch.testing.assert_close(ops.rope(x, cos_sin).double(), expected, rtol=1e-5, atol=1e-5)
    expected = torch.cat((torch.view_as_real(pairs).flatten(-2), x[..., 10:].double()), -1)
    torch.testing.assert_close(ops.rope(x, cos_sin, True).double(), expected, rtol=1e-5, atol=1e-5)


def test_norms_equal_their_formulas_in_double_precision() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(T, D), torch.randn(D), torch.randn(D)
    y = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-3).double(), y * w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ops.rms_norm(x, w, 1e-3, 1.0, False).double(), y * (w.double() + 1), rtol=1e-5, atol=1e-5
    )
    expected = F.layer_norm(x.double(), (D,), w.double(), b.double(), 1e-3)
    torch.testing.assert_close(ops.layer_norm(x, w, b, 1e-3).double(), expected, rtol=1e-5, atol=1e-5)
