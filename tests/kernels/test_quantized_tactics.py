"""Tactics of quantised linears: the default's bits by every one of them, and what is refused by name and by reason."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from tritium import ops
from tritium.errors import KernelError
from tritium.kernels.cpu import library
from tritium.kernels.kernel import Kernel, Tactic, resolve
from tritium.kernels.select import refuse_tactic, valid_tactics
from tritium.kernels.table import KERNELS
from tritium.ops.quantized import rows_with_scales
from tritium.quant.schemes import INT8, WeightFormat
from tritium.quant.weights import quantize_weight, scales_of
from tritium.testing.isa_levels import HERE, LEVELS, compiled
from tritium.testing.kernel_cases import specs_of

pytestmark = pytest.mark.usefixtures("two_threads")
ROWS = {kernel.op: kernel for kernel in KERNELS if kernel.name.startswith("cpu.quantized_linear")}
PLAIN = ROWS["quantized_linear"]
FORMATS = (INT8, *(WeightFormat("int4", size) for size in (32, 128, 160, 512)))
EACH_FORMAT = pytest.mark.parametrize("weight_format", FORMATS, ids=lambda kept: kept.name)
COUNTS = (*range(1, 41), 512)


@pytest.fixture(params=["native", *(pytest.param(n, marks=pytest.mark.full) for n in HERE if n != "native")])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels compiled for one level stand in for the library, which is the native level itself."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "native":
            other = compiled(LEVELS[request.param])
            patch.setattr(library, "_load", lambda: (other, ""))
        yield request.param


def arguments(num_rows: int, num_out: int, num_in: int, kept: WeightFormat, dtype: torch.dtype) -> dict[str, Any]:
    """Activations with an outlier in each row and weights at both ends of their range, of which sums are largest."""
    x, weight = torch.randn(num_rows, num_in), torch.randn(num_out, num_in)
    x[:, num_in // 2] *= 10
    x[::5] = torch.where(x[::5] < 0, -2.0, 2.0)
    weight[::7] = -0.5
    scales = scales_of(weight, kept)
    bias = torch.randn(num_out).to(dtype) if num_out % 2 else None
    return {
        "x": x.to(dtype),
        "qweight": quantize_weight(weight, scales, kept),
        "scales_NG": scales,
        "bias": bias,
        "int8_activations": True,
    }


def packed(kernel: Kernel, args: Mapping[str, Any]) -> dict[str, Any]:
    return {**args, **{name: resolve(pack)(args[name]) for name, pack in kernel.pack.items()}}


def compute(kernel: Kernel, args: Mapping[str, Any], num_rows: int, num_out: int, tactic: Tactic) -> torch.Tensor:
    """By packed weights, of the first rows, from a poisoned output."""
    dtype = getattr(torch, args["dtype"]) if "dtype" in args else args["x"].dtype
    out = torch.full((num_rows, num_out), float("nan"), dtype=dtype)
    cut = {name: args[name][:num_rows] for name in ("x", "residual") if name in args}
    resolve(kernel.target)({**args, **cut}, [out], **tactic)()
    return out


def paths(tactics: list[Tactic]) -> list[str]:
    return [str(tactic["path"]) for tactic in tactics]


def expected_tactics(kept: WeightFormat, *, is_int8: bool) -> list[str]:
    """What there is to choose."""
    if not library.has_tiles() or not is_int8:
        return ["auto"]
    return ["auto", "vectors", "tiles", *(["groups"] if kept.group_size in (128, 512) else [])]


def check_bits(kept: WeightFormat, num_out: int, num_in: int, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    args = arguments(counts[-1], num_out, num_in, kept, dtype)
    tactics = valid_tactics(PLAIN, specs_of(args))
    assert paths(tactics) == expected_tactics(kept, is_int8=True)
    expected, bound = ops.quantized_linear(**args), packed(PLAIN, args)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_rows in counts:
            for tactic in tactics:
                found = compute(PLAIN, bound, num_rows, num_out, tactic)
                assert torch.equal(found, expected[:num_rows]), f"{tactic}, {num_rows} rows, {num_threads} threads"


@EACH_FORMAT
def test_every_tactic_gives_the_references_bits_for_every_number_of_rows(
    level: str, weight_format: WeightFormat
) -> None:
    check_bits(weight_format, 65, (weight_format.group_size or 103) * 5, torch.bfloat16, COUNTS)


@EACH_FORMAT
def test_sums_over_all_of_a_long_k_are_the_same_by_every_tactic(level: str, weight_format: WeightFormat) -> None:
    for num_in in (4096, 8192 + 512) if weight_format.group_size != 160 else (4160,):
        check_bits(weight_format, 33, num_in, torch.bfloat16, (1, 17, 33, 290))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@EACH_FORMAT
def test_every_tactic_gives_the_references_bits_for_every_shape(
    level: str, weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    group = weight_format.group_size
    for num_out, num_in in (
        (1, group or 1),
        (33, (group or 13) * 3),
        (64, (group or 64) * 4),
        (127, (group or 37) * 7),
    ):
        check_bits(weight_format, num_out, num_in, dtype, COUNTS)
    check_bits(weight_format, 35, 1 << 16 if group != 160 else 160 * 400, dtype, (1, 40))


@EACH_FORMAT
def test_all_quantised_linears_have_the_tactics_and_int8_rows_do(level: str, weight_format: WeightFormat) -> None:
    num_in = (weight_format.group_size or 32) * 2
    args = arguments(40, 66, num_in, weight_format, torch.bfloat16)
    residual = {"residual": torch.randn(40, 66).bfloat16()}
    rows = {"x": rows_with_scales(args["x"]), "dtype": "bfloat16"}
    cases = (
        ("quantized_linear", rows, 66),
        ("quantized_linear_activation", {"kind": "gelu"}, 66),
        ("quantized_linear_activation", {"kind": "gelu", **rows}, 66),
        ("quantized_linear_gated", {"kind": "silu"}, 33),
        ("quantized_linear_gated", {"kind": "silu", **rows}, 33),
        ("quantized_linear_add", residual, 66),
        ("quantized_linear_add", {**residual, **rows}, 66),
    )
    for op, more, num_out in cases:
        kernel, of_op = ROWS[op], {**args, **more}
        tactics = valid_tactics(kernel, specs_of(of_op))
        assert paths(tactics) == expected_tactics(weight_format, is_int8=True)
        bound = packed(kernel, of_op)
        for num_rows in (1, 9, 17, 40):
            first, *others = (compute(kernel, bound, num_rows, num_out, tactic) for tactic in tactics)
            assert first.isfinite().all() and all(torch.equal(first, other) for other in others), f"{op}, {num_rows}"


def test_float_activations_are_offered_no_other_path() -> None:
    args = arguments(3, 65, 512, WeightFormat("int4", 128), torch.bfloat16) | {"int8_activations": False}
    assert paths(valid_tactics(PLAIN, specs_of(args))) == expected_tactics(FORMATS[0], is_int8=False)


def test_what_cannot_run_is_refused_with_its_values_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(kept: WeightFormat, num_in: int = 256, *, is_int8: bool = True, **tactic: str) -> str:
        """That of choosing, which is that of binding."""
        args = arguments(3, 32, num_in, kept, torch.float32) | {"int8_activations": is_int8}
        reason = str(refuse_tactic(PLAIN, specs_of(args), tactic))
        with pytest.raises(KernelError) as error:
            compute(PLAIN, packed(PLAIN, args), 3, 32, tactic)
        assert str(error.value).startswith(f"a quantised linear with path={tactic['path']!r}: ")
        assert str(error.value).endswith("; leave the tactic out")
        return reason if reason in str(error.value) else f"{reason} / {error.value}"

    small, large = WeightFormat("int4", 32), WeightFormat("int4", 1024)
    unknown = refusal(INT8, path="sideways")
    assert "cpu.quantized_linear has no such tactic" in unknown and "one of auto, vectors, tiles, groups" in unknown
    monkeypatch.setattr(library, "has_tiles", lambda: True)
    assert "activations are not int8, and another path would give other bits" in refusal(
        INT8, is_int8=False, path="tiles"
    )
    assert "8 bits are not in groups" in refusal(INT8, path="groups")
    assert "groups are of 32, not 4 bits in groups of a multiple of 64 up to 512" in refusal(small, path="groups")
    assert "groups are of 1024" in refusal(large, 2048, path="groups")
    monkeypatch.setattr(library, "has_tiles", lambda: False)
    for tactic in ({"path": "tiles"}, {"path": "vectors"}):
        assert "there are no AMX tiles in this process, and nothing to choose" in refusal(INT8, **tactic)
