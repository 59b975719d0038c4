"""A KV cache in int8 on a GPU: what is written is the op's, what is read is right, and what is not seen is not read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tritium import LLM, SamplingParams, ops
from tritium.kernels.kernel import LaunchContext, resolve
from tritium.kernels.table import KERNELS
from tritium.ops.kv_int8 import parts_of, quantize_cache
from tritium.ops.quantized import SCALE_BYTES, quantize_rows
from tritium.testing.attention_problems import Problem

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_GPU else ()))
MIXED = [(1, 1), (1, 130), (1, 64), (3, 3), (17, 150), (70, 70), (66, 129)]
DEMO = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.mark.parametrize(("pairs", "interleaved"), [(0, False), (12, False), (6, True)])
def test_what_is_written_is_the_ops_and_nothing_else(pairs: int, interleaved: bool, device: torch.device) -> None:
    qkv = torch.randn(6, 11 * 24 + 5, device=device)[:, 5:].unflatten(1, (11, 24))
    q, k, v = qkv[:, :5], qkv[:, 5:8], qkv[:, 8:]
    v[2] = 0
    v[3, 1, 5], k[4, 0, 3] = float("nan"), float("inf")
    cache = torch.full((5, 2, 2, 3, 8, 24 + SCALE_BYTES), 7, dtype=torch.int8, device=device)[:, 1]
    args: dict[str, Any] = {
        "k_TKH": k,
        "v_TKH": v,
        "slot_mapping_T": torch.tensor([9, -1, 39, 8, 17, 15], device=device),
    }
    expected, out, outputs = cache.clone(), torch.full(q.shape, float("nan"), device=device), []
    if pairs:
        angles = torch.rand(6, pairs, device=device) * 50
        args |= {"q_TNH": q, "cos_sin": torch.cat((angles.cos(), angles.sin()), -1), "interleaved": interleaved}
        outputs = [out]
    op = "rope_kv_store" if pairs else "kv_store"
    wanted = ops.op_named(op).reference(**args, cache_layer=expected)
    resolve(next(k.target for k in KERNELS if k.name == f"gpu.{op}_int8"))({**args, "cache_layer": cache}, outputs)()
    if pairs:
        torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    (integers, scales), (wanted_integers, wanted_scales) = parts_of(cache), parts_of(expected)
    is_written = (wanted_scales != 7).any(-1)
    assert is_written.any() and torch.equal((scales != 7).any(-1), is_written)
    assert (integers[~is_written] == 7).all()
    scales, wanted_scales = (x.contiguous().view(torch.float32) for x in (scales, wanted_scales))
    torch.testing.assert_close(scales[is_written], wanted_scales[is_written], rtol=1e-6, atol=0, equal_nan=True)
    step = (integers.int() - wanted_integers.int()).abs()  # beside a half, rounding may part
    assert step.max() <= 1 and (step > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(8, 2, 64), (3, 3, 20), (2, 2, 256), (16, 2, 128)], ids=str)
def test_attention_over_it_is_right_and_blind_to_what_is_not_seen(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    from tritium.kernels.gpu import attention, attention_fixed

    chunks = list(enumerate(MIXED))
    for page, window, softcap in ((16, 0, 0.0), (64, 70, 20.0)):
        problem = Problem.draw([c for _, c in MIXED], *shape, dtype, window=window, softcap=softcap)
        args = problem.args(chunks, block_size=page)
        args["cache_layer"] = quantize_cache(args["cache_layer"].float())
        for part in (problem.k, problem.v):
            rows = [quantize_rows(x.float()) for x in part]
            part[:] = [integers * scales for integers, scales in rows]
        num_decodes = int(args["batch_counts"][3])
        context = LaunchContext(
            num_decodes=num_decodes,
            num_prefills=len(MIXED) - num_decodes,
            num_prefill_tokens=sum(count for count, _ in MIXED[num_decodes:]),
            longest_prefill=max(length for _, length in MIXED[num_decodes:]),
        )
        on_device = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in args.items()}
        exact, plain, low = (
            torch.cat([problem.dense(i, chunk, arithmetic) for i, chunk in chunks]).to(kept)
            for arithmetic, kept in ((torch.float64, torch.float64), (torch.float32, dtype), (dtype, dtype))
        )
        limit = torch.maximum((plain - exact).abs(), (low - exact).abs())
        ulp = torch.finfo(dtype).eps * exact.abs().max() / 2
        for kernel in (attention, attention_fixed):
            out = torch.full_like(on_device["q_TNH"], 77.0)
            kernel.bind(on_device, [out], context)()
            error = (out.cpu() - exact).abs()
            assert error.square().mean().sqrt() <= 2 * limit.square().mean().sqrt() + ulp
            assert error.max() <= 3 * limit.max() + 2 * ulp


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("invariance", ["fast", "bitwise"])
def test_a_model_with_it_says_on_a_gpu_what_it_says_on_a_cpu(
    invariance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    prompts = ["def main(", "import os\n" * 20, "class A:"]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    answers = []
    for device in ("cuda", "cpu"):
        options: dict[str, Any] = {"device": device, "invariance": invariance if device == "cuda" else None}
        with LLM(DEMO, dtype="float32", kv_dtype="int8", max_num_seqs=4, **options) as llm:
            answers.append([out.outputs[0].token_ids for out in llm.generate(prompts, params, use_progress=False)])
    assert all(len(tokens) == 16 for tokens in answers[0]) and answers[0] == answers[1]
