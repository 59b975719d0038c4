"""Indices that a GPU may not read by: each op that has some, as torch itself takes or refuses them on a CPU."""

from typing import Any

import pytest
import torch

from tritium.kernels.eager.index_checks import index_check
from tritium.ops.torch_ops import TORCH_OPS, overload

TABLE = torch.arange(12.0).view(3, 4)
CASES: dict[str, tuple[list[str], dict[str, Any], int, int]] = {  # names in order, the rest, first and last index
    "aten.embedding.default": (["weight", "indices"], {}, 0, 2),
    "aten.index_select.default": (["self", "dim", "index"], {"dim": 1}, 0, 3),
    "aten.gather.default": (["self", "dim", "index"], {"dim": 0}, 0, 2),
    "aten.scatter.value": (["self", "dim", "index", "value"], {"dim": 1, "value": 5.0}, 0, 3),
    "aten.one_hot.default": (["self", "num_classes"], {"num_classes": 4}, 0, 3),
    "aten.index.Tensor": (["self", "indices"], {}, -3, 2),
}
ONE_DIMENSION = ("aten.index_select.default", "aten.embedding.default", "aten.one_hot.default", "aten.index.Tensor")


def arguments(op: str, index: int) -> dict[str, Any]:
    names, rest, _, _ = CASES[op]
    indices = torch.full((2,) if op in ONE_DIMENSION else (1, 1), index)
    found: dict[str, Any] = {"self": indices if "one_hot" in op else TABLE, "weight": TABLE, "index": indices}
    found["indices"] = [indices] if op == "aten.index.Tensor" else indices
    return {name: (found | rest)[name] for name in names}


@pytest.mark.parametrize("op", CASES)
def test_it_takes_what_torch_takes_and_refuses_what_torch_refuses(op: str) -> None:
    *_, first, last = CASES[op]
    for index in (first, last):
        args = arguments(op, index)
        overload(op)(*args.values())
        check = index_check(op, args)
        assert check is not None
        check()
    for index in (first - 1, last + 1):
        args = arguments(op, index)
        with pytest.raises((IndexError, RuntimeError)):
            overload(op)(*args.values())
        check = index_check(op, args)
        assert check is not None
        with pytest.raises(IndexError, match=f"an index is outside {first} to {last}"):
            check()


def test_of_several_indices_each_has_its_dimension_and_masks_have_none() -> None:
    mask = torch.tensor([True, False, True])
    fine = {"self": TABLE, "indices": [None, torch.tensor([3, -4])]}
    for args in (fine, {"self": TABLE, "indices": [mask, torch.tensor([3, 0])]}):
        check = index_check("aten.index.Tensor", args)
        assert check is not None
        check()
    check = index_check("aten.index.Tensor", {"self": TABLE, "indices": [mask, torch.tensor([4])]})
    assert check is not None
    with pytest.raises(IndexError, match="outside -4 to 3"):
        check()


def test_an_op_without_indices_has_no_check() -> None:
    assert index_check("aten.relu6.default", {"self": TABLE}) is None
    assert set(CASES) <= set(TORCH_OPS)
