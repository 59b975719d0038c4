"""Every kernel of every op that computes rows: right within the tolerance rule, and each row by itself.

Tolerance (DESIGN "Testing"): err(kernel) <= 2 * err(low-precision reference) + 1 ulp, both against double precision.
"""

import pytest
import torch

from tritium import ops
from tritium.kernels.cpu import library
from tritium.kernels.kernel import Kernel, TensorSpec, resolve
from tritium.kernels.table import KERNELS
from tritium.testing.kernel_cases import CASES, Case, bind, first_rows, in_double, run

pytestmark = pytest.mark.usefixtures("two_threads")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [
    pytest.param(k, c, id=f"{k.name}-{c.name}") for c in CASES for k in KERNELS if k.op == c.op and k.backend != "gpu"
]


def _refuses(kernel: Kernel, args: dict) -> str | None:
    specs = {
        n: TensorSpec(dtype=a.dtype, shape=tuple(a.shape)) if isinstance(a, torch.Tensor) else a
        for n, a in args.items()
    }
    return resolve(kernel.supports)(specs) if kernel.supports else None


def _dense(args: dict) -> dict:
    """The arguments without what lies between their rows: torch 2.13 reads beyond a bf16 row on AMX (NaN spreads)."""
    return {n: a.contiguous() if isinstance(a, torch.Tensor) else a for n, a in args.items()}


def test_the_compiler_of_this_machine_builds_the_library() -> None:
    assert library.why_not() == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("kernel", "case"), PAIRS)
def test_a_kernel_is_within_twice_the_references_own_error(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    for num_tokens in (kernel.row_multiple, 12, 33):
        args = case.make(num_tokens, dtype)
        assert _refuses(kernel, args) is None
        reference = ops.op_named(case.op).reference(**_dense(args))
        exact = case.exact(**in_double(args))
        out = run(kernel, args, tuple(reference.shape), reference.dtype)
        ulp = torch.finfo(reference.dtype).eps * exact.abs().max()
        limit = 2 * (reference.double() - exact).abs().max() + ulp
        error = (out.double() - exact).abs().max()
        assert error <= limit, f"error {error:.3g}, limit {limit:.3g} at {num_tokens} rows"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("kernel", "case"), PAIRS)
def test_a_rows_bits_depend_on_no_other_row_and_not_on_threads(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    args = case.make(64, dtype)
    exact, out_dtype = case.exact(**in_double(args)), ops.op_named(case.op).reference(**args).dtype
    whole = run(kernel, args, tuple(exact.shape), out_dtype)
    assert not whole.isnan().any()
    torch.set_num_threads(1)
    is_cast_only = kernel.backend == "eager" and dtype != torch.float32  # the fp32 code and a cast
    for num_rows in (1, 2, 3, 5, 8, 13, 34) if is_cast_only else range(1, 65):
        if num_rows % kernel.row_multiple:
            continue
        start = (64 - num_rows) // 3
        part = torch.empty_like(whole[:num_rows])
        bind(kernel, first_rows(case, args, start, start + num_rows), part)()
        assert torch.equal(part, whole[start : start + num_rows]), f"{num_rows} rows from {start}"


@pytest.mark.parametrize(("kernel", "case"), [p for p in PAIRS if p.values[0].backend == "cpu"])
def test_a_batch_that_is_shared_by_threads_has_the_bits_of_one_thread(kernel: Kernel, case: Case) -> None:
    args = case.make(700, torch.float32)
    shape = tuple(case.exact(**in_double(args)).shape)
    shared = run(kernel, args, shape, torch.float32)
    torch.set_num_threads(1)
    assert torch.equal(run(kernel, args, shape, torch.float32), shared)


@pytest.mark.parametrize(
    "name", ["cpu.rms_norm", "cpu.layer_norm", "cpu.activation", "cpu.gated_activation", "cpu.rope"]
)
def test_a_layout_that_cannot_be_walked_gives_the_bits_of_a_dense_copy(name: str) -> None:
    kernel = next(k for k in KERNELS if k.name == name)
    case = next(c for c in CASES if c.op == kernel.op)
    args = case.make(7, torch.bfloat16)
    shape = tuple(args[case.rows[0]].shape)
    odd = {n: a.t().contiguous().t() if n in case.rows and a.dim() == 2 else a for n, a in args.items()}
    if name == "cpu.rope":
        odd["x_TNH"] = args["x_TNH"].transpose(0, 2).contiguous().transpose(0, 2)
    assert any(odd[n].stride() != args[n].stride() and odd[n].stride(-1) != 1 for n in case.rows)
    assert torch.equal(run(kernel, odd, shape, torch.bfloat16), run(kernel, args, shape, torch.bfloat16))


def test_gated_activation_takes_two_halves_of_heads_and_a_dense_tensor_with_a_view() -> None:
    kernel = next(k for k in KERNELS if k.name == "cpu.gated_activation")
    both = torch.randn(5, 3, 2 * 24)
    gate, up = both.chunk(2, dim=-1)
    expected = run(
        kernel, {"gate": gate.contiguous(), "up": up.contiguous(), "kind": "silu"}, (5, 3, 24), torch.float32
    )
    for args in ({"gate": gate, "up": up}, {"gate": gate.contiguous(), "up": up}):
        assert torch.equal(run(kernel, {**args, "kind": "silu"}, (5, 3, 24), torch.float32), expected)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "quick_gelu"])
def test_nan_and_large_values_pass_through_compiled_activations(kind: str) -> None:
    kernel = next(k for k in KERNELS if k.name == "cpu.activation")
    x = torch.tensor([[float("nan"), float("inf"), 1e30, 104.0, 88.0, 0.0, 1e-40, -88.0, -104.0, -1e30]])
    out = run(kernel, {"x": x, "kind": kind}, (1, 10), torch.float32)[0]
    assert out[0].isnan() and torch.equal(out[1:6], x[0, 1:6])
    torch.testing.assert_close(out[6:], ops.activation(x, kind)[0, 6:], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", ["cpu.kv_store", "eager.kv_store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_kv_store_writes_exactly_the_named_slots_of_a_strided_cache(name: str, dtype: torch.dtype) -> None:
    kernel = next(k for k in KERNELS if k.name == name)
    num_kv_heads, head_size, block_size = 3, 20, 8
    qkv = torch.randn(70, 2, 9, head_size).to(dtype)
    k, v = qkv[:, 0, 2:5], qkv[:, 1, 5:8]
    slots = torch.randperm(10 * block_size)[:70]
    slots[::7] = -1
    storage = torch.full((10, 4, 2, num_kv_heads, block_size, head_size), float("nan"), dtype=dtype)
    expected = storage[:, 1].clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // block_size, 0, :, slot % block_size] = k[token]
            expected[slot // block_size, 1, :, slot % block_size] = v[token]
    args = {"k_TKH": k, "v_TKH": v, "cache_layer": storage[:, 1], "slot_mapping_T": slots}
    assert _refuses(kernel, args) is None
    resolve(kernel.target)(args, [])()
    assert torch.equal(storage[:, 1].nan_to_num(7.0), expected.nan_to_num(7.0))
    assert storage[:, [0, 2, 3]].isnan().all()


def test_eager_paged_attention_gives_a_row_the_same_bits_in_every_batch_and_chunk() -> None:
    kernel = next(k for k in KERNELS if k.name == "eager.paged_attention")
    num_heads, num_kv_heads, head_size, block_size, length = 6, 3, 20, 4, 23
    cache = torch.randn(12, 2, num_kv_heads, block_size, head_size)
    q = torch.randn(length, num_heads, head_size)
    table = torch.tensor([[3, 9, 1, 7, 2, 5], [11, 10, 8, 0, 0, 0]], dtype=torch.int32)

    def call(starts: list[int], lens: list[int], rows: torch.Tensor) -> torch.Tensor:
        int32 = {"dtype": torch.int32}
        counts = torch.tensor([len(lens), starts[-1], len(lens), 0], **int32)
        args = {"q_TNH": rows, "cache_layer": cache, "block_table_SB": table[: len(lens)]}
        args |= {"cu_seqlens_q": torch.tensor(starts, **int32), "context_lens_S": torch.tensor(lens, **int32)}
        args |= {"batch_counts": counts, "scale": 0.2, "window": 9, "softcap": 3.0}
        return run(kernel, args, tuple(rows.shape), torch.float32)

    whole = call([0, length], [length], q)
    chunks = [call([0, 5], [end], q[end - 5 : end]) for end in (5, 10, 15, 20)]
    assert torch.equal(torch.cat(chunks), whole[:20])
    assert torch.equal(call([0, 1, 8], [length, 9], torch.cat((q[-1:], q[:7])))[:1], whole[-1:])
    torch.set_num_threads(1)
    assert torch.equal(call([0, length], [length], q), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_an_embedding_of_an_id_without_a_row_is_nan_and_reads_no_other_memory(dtype: torch.dtype) -> None:
    (kernel,) = (k for k in KERNELS if k.name == "cpu.embedding")
    table = torch.randn(10, 24).to(dtype)
    ids = torch.tensor([0, 3, 4, -1, 1 << 40, 2])
    out = run(kernel, {"ids_T": ids, "weight_VD": table[:4]}, (6, 24), dtype)
    assert torch.equal(out[[0, 1, 5]], table[[0, 3, 2]])
    assert out[2:5].isnan().all()
