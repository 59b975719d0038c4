"""The table and the choice: every op has a row for everything, and a refusal says what was tried."""

import pytest
import torch

from tritium import ops
from tritium.errors import KernelError
from tritium.kernels import select
from tritium.kernels.kernel import TensorSpec, resolve
from tritium.kernels.table import KERNELS

ALL = frozenset({"cpu", "eager"})


def _spec(*shape: int | None, dtype: torch.dtype = torch.bfloat16) -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=shape)


def test_every_string_of_the_table_names_something_callable_and_names_are_unique() -> None:
    for kernel in KERNELS:
        is_gpu = kernel.backend == "gpu"  # its code needs triton; what says whether it can run does not
        for target in (kernel.supports, *(() if is_gpu else (kernel.target, *kernel.pack.values()))):
            assert target is None or callable(resolve(target)), target
    assert len({k.name for k in KERNELS}) == len(KERNELS)


def test_every_op_has_an_eager_row_that_refuses_nothing() -> None:
    general = {k.op for k in KERNELS if k.backend == "eager" and k.supports is None}
    assert {op.name for op in ops.OPS} <= general


def test_the_first_row_that_supports_the_arguments_is_chosen() -> None:
    linear = {"x": _spec(None, 64), "weight_NK": _spec(32, 64), "bias": None}
    assert select.choose("linear", linear, available=ALL).name == "cpu.linear"
    assert select.choose("linear", linear, available={"eager"}).name == "eager.linear"
    mixed = {**linear, "weight_NK": _spec(32, 64, dtype=torch.float16)}
    assert select.choose("linear", mixed, available=ALL).name == "eager.linear"
    norm = {"x": _spec(None, 64), "weight": _spec(64), "eps": 1e-5}
    assert select.choose("rms_norm", norm, available=ALL).name == "cpu.rms_norm"
    mixed = {**norm, "weight": _spec(64, dtype=torch.float32)}
    assert select.choose("rms_norm", mixed, available=ALL).name == "eager.rms_norm"
    assert select.choose("aten.add.Tensor", {"self": _spec(None, 64), "other": 1.0}, available=ALL).backend == "eager"


def test_a_refusal_lists_each_kernel_that_was_tried_and_why() -> None:
    args = {"x": _spec(None, 64), "weight": _spec(64, dtype=torch.float32), "eps": 1e-5}
    with pytest.raises(KernelError) as error:
        select.choose("rms_norm", args, available={"cpu"})
    text = str(error.value)
    assert "no kernel can run rms_norm(x=bfloat16[?, 64], weight=float32[64], eps=1e-05)" in text
    assert "cpu.rms_norm: the dtypes differ: x is bfloat16, weight is float32" in text
    assert "eager.rms_norm: backend eager is not available (cpu is)" in text


def test_unknown_ops_are_refused_by_name() -> None:
    with pytest.raises(KernelError, match=r"no kernel implements aten.cummax.default\(self=bfloat16\[\?, 4\], dim=0\)"):
        select.choose("aten.cummax.default", {"self": _spec(None, 4), "dim": 0}, available=ALL)


def test_a_plans_kernel_is_kept_where_it_can_run_and_an_eager_one_never_binds() -> None:
    linear = {"x": _spec(None, 64), "weight_NK": _spec(32, 64), "bias": None}
    doubles = {n: a and _spec(*a.shape, dtype=torch.float64) for n, a in linear.items()}

    def chosen(args: dict, preferred: str, available: frozenset[str] = ALL) -> str:
        return select.choose("linear", args, available=available, preferred=preferred).name

    assert chosen(linear, "cpu.linear") == "cpu.linear"
    assert chosen(doubles, "cpu.linear") == "eager.linear"  # built where the kernel had the dtype
    assert chosen(linear, "cpu.linear", frozenset({"eager"})) == "eager.linear"
    assert chosen(linear, "eager.linear") == "cpu.linear"  # built where there was no compiler
    assert chosen(linear, "cpu.rope") == "cpu.linear"  # of another op
    assert chosen(linear, "cpu.magic") == "cpu.linear"


@pytest.mark.parametrize(
    ("op", "args", "reason"),
    [
        (
            "rope",
            {"x_TNH": _spec(None, 2, 8), "cos_sin": _spec(None, 16, dtype=torch.float32)},
            "rotates 16 dimensions",
        ),
        ("rope", {"x_TNH": _spec(None, 2, 8), "cos_sin": _spec(None, 8)}, "cos_sin is torch.bfloat16"),
        ("activation", {"x": _spec(None, 8), "kind": "swish"}, "kind 'swish' is not one of silu"),
        ("gated_activation", {"gate": _spec(None, 8), "up": _spec(None, 1), "kind": "silu"}, "gate has sizes"),
        ("embedding", {"ids_T": _spec(None, dtype=torch.int32), "weight_VD": _spec(9, 8)}, "not a list of int64"),
        ("activation", {"x": _spec(None, 8, dtype=torch.float64), "kind": "silu"}, "float64, which it has no code for"),
    ],
)
def test_a_compiled_kernel_says_why_it_refuses(op: str, args: dict, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        select.choose(op, args, available={"cpu"})
