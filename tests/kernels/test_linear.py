"""The compiled linear on each of its paths: right, and a row's bits are its own whatever the batch and the threads."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tritium.kernels.cpu import library, linear
from tritium.kernels.table import KERNELS
from tritium.testing.isa_levels import HERE, LEVELS, TWO_KERNELS, compiled
from tritium.testing.kernel_cases import bind, run

pytestmark = pytest.mark.usefixtures("two_threads")
KERNEL = next(k for k in KERNELS if k.name == "cpu.linear")
FULL = ("avx512", "sse")
SHAPES = ((1, 1), (33, 37), (100, 64), (65, 257), (31, 1030), (700, 96))  # N, K
ROWS = (*range(1, 65), 100, 257, 513)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.full] * (n in FULL)) for n in HERE])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The linear kernels compiled for one level stand in for the library. A CPU without a level has fewer to test."""
    linears = compiled(LEVELS[request.param], TWO_KERNELS if request.param == "native without amx" else ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_load", lambda: (linears, ""))
        yield request.param


def arguments(num_rows: int, num_out: int, num_in: int, dtype: torch.dtype, *, has_bias: bool = True) -> dict:
    bias = torch.randn(num_out).to(dtype) if has_bias else None
    return {
        "x": torch.randn(num_rows, num_in).to(dtype),
        "weight_NK": torch.randn(num_out, num_in).to(dtype),
        "bias": bias,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_a_row_has_the_same_bits_in_every_batch_and_on_any_number_of_threads(
    level: str, num_out: int, num_in: int, dtype: torch.dtype
) -> None:
    args = arguments(ROWS[-1], num_out, num_in, dtype)
    whole = run(KERNEL, args, (ROWS[-1], num_out), dtype)
    packed = bind_packed(args)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_rows in ROWS:
            start = (ROWS[-1] - num_rows) // 3
            part = torch.full((num_rows, num_out), float("nan"), dtype=dtype)
            packed(args["x"][start : start + num_rows], part)
            assert torch.equal(part, whole[start : start + num_rows]), f"{num_rows} rows, {num_threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("num_out", "num_in"), [(33, 37), (65, 257), (31, 1030), (96, 4100)])
def test_every_tactic_gives_the_bits_of_the_first(level: str, num_out: int, num_in: int, dtype: torch.dtype) -> None:
    args = arguments(300, num_out, num_in, dtype)
    weight = linear.pack_weight(args["weight_NK"])
    assert len(KERNEL.tactics) > 3
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_rows in (1, 3, 63, 129, 300):
            found = [torch.full((num_rows, num_out), float("nan"), dtype=dtype) for _ in KERNEL.tactics]
            for tactic, out in zip(KERNEL.tactics, found, strict=True):
                linear.bind({**args, "x": args["x"][:num_rows], "weight_NK": weight}, [out], **tactic)()
                assert torch.equal(out, found[0]), f"{tactic}, {num_rows} rows, {num_threads} threads"


def bind_packed(args: dict) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """Calls the kernel on other rows with the weight packed once."""
    weight = linear.pack_weight(args["weight_NK"])
    return lambda x, out: linear.bind({**args, "x": x, "weight_NK": weight}, [out])()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("num_out", "num_in"), [*SHAPES, (16, 4100)])
def test_the_error_is_that_of_sums_in_fp32(level: str, num_out: int, num_in: int, dtype: torch.dtype) -> None:
    args = arguments(37, num_out, num_in, dtype, has_bias=num_out % 2 == 1)
    double = {n: a if a is None else a.double() for n, a in args.items()}
    exact = torch.nn.functional.linear(double["x"], double["weight_NK"], double["bias"])
    terms = torch.nn.functional.linear(double["x"].abs(), double["weight_NK"].abs())
    error = (run(KERNEL, args, (37, num_out), dtype).double() - exact).abs()
    # one rounding of the result; and of chains of 64 in fp32, whose error stays far under their length times eps
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + 16 * torch.finfo(torch.float32).eps * terms + 1e-7
    assert (error <= limit).all(), f"{(error / limit).max():.3g} times the limit"


def test_infinities_and_nan_stay_in_their_row_and_padding_adds_none(level: str) -> None:
    for dtype in DTYPES:
        args = arguments(40, 33, 37, dtype)
        clean = run(KERNEL, args, (40, 33), dtype)
        args["x"][3, 5], args["x"][20, 36] = float("inf"), float("nan")
        out = run(KERNEL, args, (40, 33), dtype)
        is_clean = torch.ones(40, dtype=torch.bool)
        is_clean[[3, 20]] = False
        assert torch.equal(out[is_clean], clean[is_clean])
        assert out[20].isnan().all() and not out[3].isfinite().any()


def test_a_strided_weight_and_rows_in_three_dimensions_are_taken(level: str) -> None:
    args = arguments(12, 40, 24, torch.bfloat16)
    expected = run(KERNEL, args, (12, 40), torch.bfloat16)
    wide = torch.full((40, 60), float("nan"), dtype=torch.bfloat16)
    wide[:, 7:31] = args["weight_NK"]
    turned = args["weight_NK"].t().contiguous().t()
    for weight in (wide[:, 7:31], turned):
        assert torch.equal(run(KERNEL, {**args, "weight_NK": weight}, (12, 40), torch.bfloat16), expected)
    out = torch.empty(3, 4, 40, dtype=torch.bfloat16)
    bind(KERNEL, {**args, "x": args["x"].view(4, 3, 24).transpose(0, 1)}, out)()
    assert torch.equal(out, expected.view(4, 3, 40).transpose(0, 1))
