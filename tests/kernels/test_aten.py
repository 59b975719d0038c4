"""The allow-list of torch functions: each equals the captured op, writes in place, and keeps rows apart."""

from typing import Any

import pytest
import torch

from tritium.errors import KernelError
from tritium.kernels.eager.aten import ALLOWED, bind_name
from tritium.kernels.kernel import resolve
from tritium.testing.kernel_cases import Args

T, D = 64, 37


def _arguments(op: str) -> Args:
    x, y = torch.randn(T, D).abs() + 0.1, torch.randn(T, D)
    scalars: dict[str, Any] = {"other": 1.7, "alpha": 2}
    special: dict[str, Args] = {
        "aten.add.Tensor": {"self": x, "other": y, "alpha": 0.3},
        "aten.sub.Tensor": {"self": x, "other": 2.5},
        "aten.mul.Tensor": {"self": x, "other": torch.randn(D)},
        "aten.div.Tensor": {"self": x, "other": torch.randn(T, 1)},
        "aten.add.Scalar": {"self": x, **scalars},
        "aten.sub.Scalar": {"self": x, **scalars},
        "aten.rsub.Scalar": {"self": x, **scalars},
        "aten.mul.Scalar": {"self": x, "other": 1.7},
        "aten.div.Scalar": {"self": x, "other": 1.7},
        "aten.maximum.default": {"self": x, "other": y},
        "aten.minimum.default": {"self": x, "other": y},
        "aten.clamp.default": {"self": y, "max": 0.5},
        "aten.where.self": {"condition": y > 0, "self": x, "other": y},
        "aten.cat.default": {"tensors": [x, y], "dim": 1},
        "aten.stack.default": {"tensors": [x, y], "dim": 1},
        "aten.mean.dim": {"self": y, "dim": [-1], "keepdim": True, "dtype": "float32"},
        "aten.sum.dim_IntList": {"self": y, "dim": [-1]},
        "aten.amax.default": {"self": y, "dim": [-1]},
        "aten.softmax.int": {"self": y, "dim": -1},
        "aten._softmax.default": {"self": y, "dim": -1, "half_to_float": False},
        "aten.to.dtype": {"self": y, "dtype": "bfloat16"},
        "aten._to_copy.default": {"self": y, "dtype": "bfloat16"},
        "aten.pow.Tensor_Scalar": {"self": x, "exponent": 1.5},
        "aten.gelu.default": {"self": y, "approximate": "tanh"},
    }
    return special.get(op, {"self": x})


def _rows(args: Args, num_rows: int) -> Args:
    def cut(value: Any) -> Any:
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            return [cut(v) for v in value]
        return value[:num_rows] if isinstance(value, torch.Tensor) and value.shape[0] == T else value

    return {name: cut(value) for name, value in args.items()}


def _captured(op: str, args: Args) -> torch.Tensor:
    """What the captured op itself computes."""
    _, name, overload = op.split(".")
    args = {n: getattr(torch, v) if n == "dtype" else v for n, v in args.items()}
    return getattr(getattr(torch.ops.aten, name), overload)(**args)


@pytest.mark.parametrize("op", ALLOWED)
def test_an_allowed_function_equals_the_captured_op_and_keeps_rows_apart(op: str) -> None:
    torch.manual_seed(0)
    args = _arguments(op)
    expected = _captured(op, args)
    bind = resolve(f"tritium.kernels.eager.aten:{bind_name(op)}")
    out = torch.full_like(expected, float("nan"))
    bind(args, [out])()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    for num_rows in (1, 2, 3, 5, 17, 63):
        part = torch.full_like(expected[:num_rows], float("nan"))
        bind(_rows(args, num_rows), [part])()
        assert torch.equal(part, out[:num_rows]), f"{num_rows} rows"


def test_an_argument_that_the_op_does_not_have_is_refused_with_its_schema() -> None:
    with pytest.raises(KernelError, match=r"aten.neg.default has no argument scale; it is aten::neg\(Tensor self\)"):
        resolve("tritium.kernels.eager.aten:neg_default")({"self": torch.ones(2), "scale": 1}, [torch.ones(2)])


def test_a_function_outside_the_list_is_not_found() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mm_default'"):
        resolve("tritium.kernels.eager.aten:mm_default")
