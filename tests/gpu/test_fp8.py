"""fp8 rows and linears on a GPU against their ops. Needs a GPU: Triton's interpreter casts fp8 wrongly."""

from typing import Any

import pytest
import torch

from tritium import ops
from tritium.kernels.gpu.tactics import LINEAR_FP8
from tritium.kernels.kernel import resolve
from tritium.kernels.table import KERNELS
from tritium.ops.fp8 import FP8, quantize_fp8
from tritium.testing.attention_problems import Problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def launch(op: str, args: dict[str, Any], outputs: list[torch.Tensor], **tactic: Any) -> None:
    kernel = next(k for k in KERNELS if k.op == op and k.backend == "gpu")
    resolve(kernel.target)(args, outputs, **tactic)()


@pytest.mark.parametrize("width", [1008, 4096, 14336])
@pytest.mark.parametrize(
    "op",
    [
        "quantize_fp8",
        "rms_norm_fp8",
        "add_rms_norm_fp8",
        "gated_activation_fp8",
        "activation_fp8",
        "activation_pair_fp8",
    ],
)
def test_rows_and_scales_are_the_ops(op: str, width: int) -> None:
    x, other = (torch.randn(33, width, device="cuda", dtype=torch.bfloat16) * 2 for _ in range(2))
    x[3] = 0
    norm = {"weight": other[0].contiguous(), "eps": 1e-5, "weight_offset": 0.0, "cast_before_weight": True}
    args: dict[str, Any] = {
        "quantize_fp8": {"x": x},
        "rms_norm_fp8": {"x": x, **norm},
        "add_rms_norm_fp8": {"x": x, "residual": other, **norm},
        "gated_activation_fp8": {"gate": x, "up": other, "kind": "silu"},
        "activation_fp8": {"x": x, "bias": other[0].contiguous(), "kind": "gelu_tanh"},
        "activation_pair_fp8": {"x": other[:, 16:400], "y": x, "bias": other[0].contiguous(), "kind": "gelu_tanh"},
    }[op]
    expected = ops.op_named(op).reference(**args)
    outputs = [torch.empty_like(t) for t in expected]
    launch(op, args, outputs)
    torch.testing.assert_close(outputs[1], expected[1], rtol=1e-2, atol=0)
    values, wanted = (t[0].float() * t[1] for t in (outputs, expected))
    assert (values - wanted).norm() <= 0.02 * wanted.norm()  # a row's numbers that fall between two of e4m3's may part
    assert ((values - wanted).abs() <= wanted.abs() / 7 + 1e-6 + expected[1] / 64).all()  # by one step at most
    if op == "add_rms_norm_fp8":
        assert torch.equal(outputs[2], expected[2])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "quick_gelu"])
@pytest.mark.parametrize("is_strided", [False, True])
def test_every_activation_of_wide_and_of_unaligned_rows_is_the_ops(kind: str, is_strided: bool) -> None:
    both = torch.randn(9, 2 * 4096 + 5, device="cuda", dtype=torch.bfloat16) * 3
    first = 1 if is_strided else 0
    x, other = (
        both[:, first : first + 4096].clone() if not first else both[:, 1:4097],
        both[:, 4096 + first :][:, :4096],
    )
    other = other if first else other.clone()
    for op, args in (
        ("activation_fp8", {"x": x, "bias": None, "kind": kind}),
        ("gated_activation_fp8", {"gate": x, "up": other, "kind": kind}),
    ):
        expected = ops.op_named(op).reference(**args)
        outputs = [torch.empty_like(t) for t in expected]
        launch(op, args, outputs)
        values, wanted = (t[0].float() * t[1] for t in (outputs, expected))
        assert (values - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 16, 17, 64, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_k", [16, 528, 4096, 14336])
def test_a_linear_is_the_ops(num_tokens: int, has_bias: bool, num_k: int) -> None:
    x, x_scales = quantize_fp8(torch.randn(num_tokens, num_k, device="cuda"))
    weight, scales = quantize_fp8(torch.randn(768, num_k, device="cuda"))
    args: dict[str, Any] = {"x": x, "x_scales": x_scales, "weight_NK": weight, "weight_scales": scales.view(1, -1)}
    bias = torch.randn(768, device="cuda", dtype=torch.bfloat16) if has_bias else None
    args |= {"bias": bias, "dtype": "bfloat16"}
    expected = ops.op_named("linear_fp8").reference(**{**args, "dtype": "float32"})
    for tactic in LINEAR_FP8:
        out = torch.full((num_tokens, 768), float("nan"), device="cuda", dtype=torch.bfloat16)
        launch("linear_fp8", args, [out], **tactic)
        assert (out.float() - expected).norm() <= 0.004 * expected.norm()  # bf16's rounding; fast sums keep 14 bits


def test_the_cache_takes_fp8_and_attention_reads_it() -> None:
    from tritium.kernels.gpu import attention
    from tritium.kernels.kernel import LaunchContext

    for heads, kv_heads, size in ((8, 2, 128), (4, 4, 128), (4, 4, 256)):
        k, v = (torch.randn(40, kv_heads, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache = torch.zeros(4, 2, kv_heads, 16, size, device="cuda").to(FP8)
        launch(
            "kv_store",
            {"k_TKH": k, "v_TKH": v, "cache_layer": cache, "slot_mapping_T": torch.arange(16, 56).cuda()},
            [],
        )
        expected = torch.zeros_like(cache)
        ops.kv_store(k, v, expected, torch.arange(16, 56, device="cuda"))
        assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
        ints = {"dtype": torch.int32, "device": "cuda"}
        args: dict[str, Any] = {
            "q_TNH": torch.randn(1, heads, size, device="cuda", dtype=torch.bfloat16),
            "cache_layer": cache,
            "block_table_SB": torch.tensor([[1, 2, 3]], **ints),
            "cu_seqlens_q": torch.tensor([0, 1], **ints),
            "context_lens_S": torch.tensor([40], **ints),
            "batch_counts": torch.tensor([1, 1, 1, 1], **ints),
            "scale": size**-0.5,
            "window": 0,
            "softcap": 0.0,
        }
        out = torch.empty_like(args["q_TNH"])
        attention.bind(args, [out], LaunchContext(num_decodes=1))()
        wanted = ops.op_named("paged_attention").reference(**args).float()
        assert (out.float() - wanted).norm() <= 0.006 * wanted.norm()


FORMS = [(0, 0.0, False), (37, 0.0, False), (0, 20.0, False), (0, 0.0, True), (70, 20.0, True)]


@pytest.mark.parametrize("page", [8, 16, 64, 128])
@pytest.mark.parametrize("shape", [(8, 2, 128), (4, 4, 128), (8, 8, 256), (16, 2, 64), (6, 2, 256)], ids=str)
@pytest.mark.parametrize("has_splits", [False, True])
def test_attention_over_an_fp8_cache_is_right_and_blind_to_what_is_not_seen(
    shape: tuple[int, int, int], page: int, has_splits: bool
) -> None:
    from tritium.kernels.gpu import attention
    from tritium.kernels.kernel import LaunchContext

    contexts = [1, 2, 8, 31, 32, 33, 64, 100, 250, *([5] * (0 if has_splits else 260))]
    for window, softcap, has_slopes in FORMS:
        slopes = torch.linspace(0.1, 0.5, shape[0]) if has_slopes else None
        problem = Problem.draw(contexts, *shape, torch.bfloat16, window=window, softcap=softcap, slopes=slopes)
        for part in (problem.k, problem.v):
            part[:] = [x.to(FP8).to(torch.bfloat16) for x in part]
        args = problem.args([(i, (1, context)) for i, context in enumerate(contexts)], block_size=page)
        args["cache_layer"] = args["cache_layer"].to(FP8)
        args = {name: a.cuda() if isinstance(a, torch.Tensor) else a for name, a in args.items()}
        assert attention.fits_bytes_kernel(args)
        out = torch.full_like(args["q_TNH"], float("nan"))
        attention.bind(args, [out], LaunchContext(num_decodes=len(contexts)))()
        for i, context in enumerate(contexts[:10]):
            want = problem.dense(i, (1, context), torch.float32)
            assert (out[i].cpu().float() - want[0]).norm() <= 0.004 * want.norm()  # bf16's rounding of the result


@pytest.mark.parametrize("tactic", [{}, {"blocks": 4}, {"blocks": 6}, {"split_below": 10**6}], ids=str)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("shape", [(8, 8, 256), (32, 8, 128)], ids=str)
def test_more_sequences_than_the_gpu_holds_at_once_are_right(
    shape: tuple[int, int, int], window: int, tactic: dict[str, int]
) -> None:
    from tritium.kernels.gpu import attention
    from tritium.kernels.kernel import LaunchContext

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    contexts = [1 + i * 37 % 90 for i in range(4 * sms)]
    assert len(contexts) * shape[1] > 2 * sms * 12  # warps of 6 blocks
    problem = Problem.draw(contexts, *shape, torch.bfloat16, window=window)
    for part in (problem.k, problem.v):
        part[:] = [x.to(FP8).to(torch.bfloat16) for x in part]
    args = problem.args([(i, (1, context)) for i, context in enumerate(contexts)], block_size=16)
    args["cache_layer"] = args["cache_layer"].to(FP8)
    args = {name: a.cuda() if isinstance(a, torch.Tensor) else a for name, a in args.items()}
    out = torch.full_like(args["q_TNH"], float("nan"))
    attention.bind(args, [out], LaunchContext(num_decodes=len(contexts)), **tactic)()
    wanted = torch.cat([problem.dense(i, (1, context), torch.float32) for i, context in enumerate(contexts)])
    error = (out.cpu().float() - wanted).flatten(1).norm(dim=1)
    assert (error <= 0.004 * wanted.flatten(1).norm(dim=1)).all()
