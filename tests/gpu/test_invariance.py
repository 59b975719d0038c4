"""invariance="bitwise" on a GPU: a row's bits are the same alone, among others, and in any chunk of its sequence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tritium import LLM, SamplingParams
from tritium.kernels.kernel import LaunchContext, resolve
from tritium.kernels.table import KERNELS
from tritium.ops.fp8 import quantize_fp8
from tritium.quant.schemes import INT8, WeightFormat
from tritium.quant.weights import quantize_weight, scales_of
from tritium.testing.attention_problems import Problem, num_leading_singles

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_GPU else ()))
NUM_ROWS = (1, 2, 17, 64, 65, 200, *((1000, 2048) if HAS_GPU else ()))
NUM_OUT, NUM_IN = (512, 4096) if HAS_GPU else (96, 256)
DEMO = Path(__file__).parents[2] / "examples" / "demo_model"


def fixed(name: str) -> Any:
    return next(kernel for kernel in KERNELS if kernel.name == f"gpu.{name}_fixed")


def check(op: str, args: dict[str, Any], rows: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
    """args are for the largest number of rows; `rows` names those that have one for each."""
    kernel = fixed(op)
    args = {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in args.items()}
    args |= {name: resolve(target)(args[name]) for name, target in kernel.pack.items()}

    def compute(start: int, stop: int) -> torch.Tensor:
        part = {name: a[start:stop].clone() if name in rows else a for name, a in args.items()}
        out = torch.empty(stop - start, NUM_OUT, dtype=dtype, device=device)
        resolve(kernel.target)(part, [out])()
        return out

    whole = compute(0, NUM_ROWS[-1])
    for count in NUM_ROWS:
        start = (NUM_ROWS[-1] - count) // 2
        assert torch.equal(compute(start, start + count), whole[start : start + count]), f"{op}: {count} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_linears_have_one_order_of_sums_for_any_number_of_rows(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.randn(NUM_ROWS[-1], NUM_IN).to(dtype), torch.randn(NUM_OUT, NUM_IN).to(dtype)
    check("linear", {"x": x, "weight_NK": weight, "bias": torch.randn(NUM_OUT).to(dtype)}, ("x",), dtype, device)
    for kept in (INT8, WeightFormat("int4", 128)):
        scales = scales_of(weight.float(), kept)
        args = {"x": x, "qweight": quantize_weight(weight.float(), scales, kept), "scales_NG": scales, "bias": None}
        check("quantized_linear", args, ("x",), dtype, device)


@pytest.mark.skipif(not HAS_GPU, reason="the interpreter casts fp8 wrongly")
def test_linears_in_fp8_have_one_order_of_sums_and_are_right() -> None:
    x, x_scales = quantize_fp8(torch.randn(NUM_ROWS[-1], NUM_IN))
    weight, scales = quantize_fp8(torch.randn(NUM_OUT, NUM_IN))
    args = {"x": x, "x_scales": x_scales, "weight_NK": weight, "weight_scales": scales.view(1, -1), "bias": None}
    check("linear_fp8", args, ("x", "x_scales"), torch.bfloat16, torch.device("cuda"))
    out = torch.empty(len(x), NUM_OUT, dtype=torch.bfloat16, device="cuda")
    resolve(fixed("linear_fp8").target)({n: a if a is None else a.cuda() for n, a in args.items()}, [out])()
    expected = (x.float() * x_scales) @ (weight.float() * scales).t()
    assert (out.float().cpu() - expected).norm() <= 0.004 * expected.norm()


def test_a_linear_is_right(device: torch.device) -> None:
    for dtype in DTYPES:
        x, weight, bias = (torch.randn(*size).to(dtype) for size in ((70, NUM_IN), (NUM_OUT, NUM_IN), (NUM_OUT,)))
        args = {"x": x.to(device), "weight_NK": weight.to(device), "bias": bias.to(device)}
        out = torch.empty(70, NUM_OUT, dtype=dtype, device=device)
        resolve(fixed("linear").target)(args, [out])()
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        rounded = torch.nn.functional.linear(x, weight, bias).double()
        ulp = torch.finfo(dtype).eps * exact.abs().max()
        assert (out.cpu().double() - exact).abs().max() <= 4 * (rounded - exact).abs().max() + ulp


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("shape", [(8, 2, 64), (3, 3, 80), (6, 1, 32)], ids=str)
def test_a_token_has_the_same_bits_in_a_prompt_in_a_chunk_and_by_itself(
    shape: tuple[int, int, int], window: int, device: torch.device
) -> None:
    from tritium.kernels.gpu import attention_fixed

    lengths = [1, 40, 131, 66]
    problem = Problem.draw(lengths, *shape, torch.float16, window=window)

    def compute(args: dict[str, Any]) -> torch.Tensor:
        args = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in args.items()}
        num_sequences, num_tokens, _, num_decodes = args["batch_counts"].tolist()
        context = LaunchContext(
            num_decodes=num_decodes,
            num_prefills=num_sequences - num_decodes,
            num_prefill_tokens=num_tokens - num_decodes,
        )
        out = torch.full_like(args["q_TNH"], 77.0)
        attention_fixed.bind(args, [out], context)()
        return out.cpu()

    whole = problem.run(compute, problem.whole(), block_size=16)
    for chunks in (
        [(2, (1, 131)), (1, (1, 33)), (3, (20, 50)), (2, (7, 90))],
        [(3, (1, 66)), (2, (100, 131))],
        [(1, (17, 40))],
    ):
        assert num_leading_singles(chunks) in (0, 1, 2)
        for (i, (count, context)), out in zip(chunks, problem.run(compute, chunks, block_size=64), strict=True):
            assert torch.equal(out, whole[i][context - count : context])


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "scheme"), [("bfloat16", None), ("float32", None), ("bfloat16", "w8a8"),
                                               ("bfloat16", "w4a16_g128"), ("bfloat16", "fp8")])  # fmt: skip
def test_an_answer_does_not_depend_on_its_company(
    dtype: str, scheme: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    texts = [
        "def main(",
        "import os\n" * 30,
        "class A:\n    def __init__(self",
        "for i in range(",
        "x = 1\n" * 60,
        "re",
    ]
    params = [
        SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=7, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=8, top_p=0.8, logprobs=2, max_tokens=40, ignore_eos=True),
    ]
    asked = [(text, params[i % 3]) for i, text in enumerate(texts)]
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype, "scheme": scheme, "invariance": "bitwise"}
    with LLM(DEMO, max_num_seqs=8, max_num_batched_tokens=48, enable_prefix_caching=False, **options) as llm:
        together = llm.generate([text for text, _ in asked], [p for _, p in asked], use_progress=False)
        alone = [llm.generate([text], p, use_progress=False)[0] for text, p in asked]
    for mine, other in zip(together, alone, strict=True):
        assert len(mine.outputs[0].token_ids) == 40 and mine.outputs[0].token_ids == other.outputs[0].token_ids
        assert mine.outputs[0].logprobs == other.outputs[0].logprobs  # to the bit
