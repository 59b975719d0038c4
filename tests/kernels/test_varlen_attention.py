"""varlen_attention: right against a textbook, bit-equal whatever else is in the batch, in any layout of q, k and v."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium import ops
from tritium.errors import KernelError
from tritium.kernels.cpu import library
from tritium.kernels.cpu.varlen import bind_varlen_attention, supports_varlen_attention
from tritium.kernels.kernel import TensorSpec
from tritium.testing.isa_levels import LEVELS, TWO_KERNELS, compiled
from tritium.testing.layouts import draw_layouts, draw_threads
from tritium.testing.packed_attention import draw, textbook

pytestmark = pytest.mark.skipif(not library.available(), reason=library.why_not())
LENGTHS = [1, 70, 3, 200, 64, 65, 128]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(4, 4, 64), (8, 2, 40), (3, 1, 16)]  # query heads, kv heads, head size


def compute(args: dict[str, Any]) -> torch.Tensor:
    out = torch.full(args["q_TNH"].shape, 77.0, dtype=args["q_TNH"].dtype)
    bind_varlen_attention(args, [out])()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("shape", "softcap"), [(shape, 0.0) for shape in SHAPES] + [(SHAPES[0], 5.0)])
def test_it_is_within_twice_the_error_of_the_textbook_in_low_precision(
    dtype: torch.dtype, shape: tuple[int, int, int], softcap: float
) -> None:
    args = draw(LENGTHS, *shape, dtype) | {"softcap": softcap}
    total = sum(LENGTHS)
    exact, low = textbook(args, torch.float64), textbook(args, dtype)
    found = compute(args)[:total]
    limit = 2 * (low.double() - exact).square().mean().sqrt() + torch.finfo(dtype).eps * exact.abs().mean()
    assert (found.double() - exact).square().mean().sqrt() <= limit


def test_the_reference_is_the_textbook() -> None:
    args = draw([5, 1, 9], 4, 2, 16, torch.float32)
    torch.testing.assert_close(ops.varlen_attention(**args)[:15], textbook(args, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequences_bits_do_not_depend_on_the_batch_nor_on_threads(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    args = draw(LENGTHS, *shape, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    whole = compute(args)
    torch.set_num_threads(1)
    starts = args["cu_seqlens_q"].tolist()
    for i, length in enumerate(LENGTHS):
        part = slice(starts[i], starts[i + 1])
        alone = {name: args[name][part].clone() for name in ("q_TNH", "k_TKH", "v_TKH")}
        counts = torch.tensor([1, length, 0, 0], dtype=torch.int32)
        found = compute(args | alone | {"cu_seqlens_q": torch.tensor([0, length]).int(), "batch_counts": counts})
        assert torch.equal(found, whole[part]), length
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "level",
    ["native without amx", pytest.param("avx2", marks=pytest.mark.full)],
)
def test_in_bf16_it_is_right_and_has_its_own_bits_without_amx_too(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = compiled(LEVELS[level], TWO_KERNELS if level == "native without amx" else ())
    monkeypatch.setattr(library, "_load", lambda: (attention, ""))
    for shape in SHAPES:
        test_it_is_within_twice_the_error_of_the_textbook_in_low_precision(torch.bfloat16, shape, 0.0)
        test_a_sequences_bits_do_not_depend_on_the_batch_nor_on_threads(torch.bfloat16, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_text_longer_than_an_items_rows_is_right(dtype: torch.dtype) -> None:
    args = draw([700, 33], 2, 1, 64, dtype)
    exact, low = textbook(args, torch.float64), textbook(args, dtype)
    error = (compute(args)[:733].double() - exact).square().mean().sqrt()
    assert error <= 2 * (low.double() - exact).square().mean().sqrt()


def test_rows_behind_the_batch_stay_as_they_are_and_are_not_read() -> None:
    out = compute(draw([3, 4], 4, 4, 16, torch.float32))
    assert bool((out[7:] == 77.0).all()) and not out[:7].isnan().any()


def test_k_and_v_of_different_layouts_are_copied_first() -> None:
    args = draw([30], 4, 4, 16, torch.float32)
    expected = compute(args)
    turned = args["v_TKH"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(compute(args | {"v_TKH": turned})[:30], expected[:30])


def test_what_it_has_no_code_for_is_refused_by_name() -> None:
    def spec(heads: int, size: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
        return TensorSpec(dtype=dtype, shape=(None, heads, size))

    def reason(q: TensorSpec, k: TensorSpec, v: TensorSpec) -> str | None:
        return supports_varlen_attention({"q_TNH": q, "k_TKH": k, "v_TKH": v})

    assert reason(spec(4, 16), spec(2, 16), spec(2, 16)) is None
    assert reason(spec(4, 16), spec(3, 16), spec(3, 16)) == "4 query heads cannot share 3 kv heads evenly"
    assert reason(spec(4, 16), spec(4, 8), spec(4, 8)) == "heads of q, k and v are 16, 8 and 8 long"
    assert reason(spec(4, 16), spec(4, 16, torch.float16), spec(4, 16)) is not None
    args = draw([3], 4, 4, 16, torch.float32)
    with pytest.raises(KernelError, match=r"counts of varlen_attention are int32, not torch.int64"):
        compute(args | {"batch_counts": args["batch_counts"].long()})


def check_drawn(data: st.DataObject) -> None:
    """Right by the rule in any layout, and one of the sequences has the same bits alone."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    num_kv_heads, size = data.draw(st.integers(1, 3)), data.draw(st.one_of(st.integers(1, 40), st.integers(60, 130)))
    shape, dtype = (num_kv_heads * data.draw(st.integers(1, 4)), num_kv_heads, size), data.draw(st.sampled_from(DTYPES))
    length = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 150]))
    lengths = data.draw(st.lists(length, min_size=1, max_size=4))
    args = draw(lengths, *shape, dtype) | {"softcap": data.draw(st.sampled_from([0.0, 5.0]))}
    exact, low = textbook(args, torch.float64), textbook(args, dtype)
    rows = {name: args[name] for name in ("q_TNH", "k_TKH", "v_TKH")}
    with draw_threads(data):
        found = compute(args | draw_layouts(data, rows))[: sum(lengths)]
    limit = 2 * (low.double() - exact).square().mean().sqrt() + torch.finfo(dtype).eps * exact.abs().mean()
    assert (found.double() - exact).square().mean().sqrt() <= limit
    chosen = data.draw(st.integers(0, len(lengths) - 1))
    part = slice(sum(lengths[:chosen]), sum(lengths[: chosen + 1]))
    alone = {name: x[part] for name, x in rows.items()}
    alone["cu_seqlens_q"] = torch.tensor([0, lengths[chosen]], dtype=torch.int32)
    alone["batch_counts"] = torch.tensor([1, lengths[chosen], 0, 0], dtype=torch.int32)
    with draw_threads(data):
        assert torch.equal(compute(args | alone), found[part])


@settings(max_examples=15)
@given(st.data())
def test_drawn_batches_are_right_and_a_sequence_has_the_same_bits_alone(data: st.DataObject) -> None:
    check_drawn(data)


@pytest.mark.full
@settings(max_examples=1500)
@given(st.data())
def test_many_drawn_batches_are_too(data: st.DataObject) -> None:
    check_drawn(data)
