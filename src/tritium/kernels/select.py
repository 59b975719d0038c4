"""Choosing a kernel for a step: the first row of the table that is available here and supports the arguments."""

from collections.abc import Mapping, Set
from typing import Any

from tritium.errors import KernelError
from tritium.kernels.kernel import Kernel, TensorSpec, resolve
from tritium.kernels.table import KERNELS


def choose(op: str, args: Mapping[str, Any], *, available: Set[str]) -> Kernel:
    """The preferred kernel for `op` with these `TensorSpec`s and literals among the backends in `available`.

    Raises `KernelError` with every kernel that was tried and why it was refused.
    """
    rows = [kernel for kernel in KERNELS if kernel.op == op]
    refusals = []
    for kernel in rows:
        reason = _refusal(kernel, args, available)
        if reason is None:
            return kernel
        refusals.append(f"  {kernel.name}: {reason}")
    call = f"{op}({', '.join(f'{name}={_show(value)}' for name, value in args.items())})"
    if not rows:
        raise KernelError(
            f"no kernel implements {call}: add a row to kernels/table.py, or write the model with its ops"
        )
    raise KernelError(f"no kernel can run {call}. Tried:\n" + "\n".join(refusals))


def named(name: str) -> Kernel:
    """The row of that name; `KernelError` when a plan names one that this version does not have."""
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise KernelError(f"this version has no kernel named {name!r}: build the engine again")


def _refusal(kernel: Kernel, args: Mapping[str, Any], available: Set[str]) -> str | None:
    if kernel.backend not in available:
        return f"backend {kernel.backend} is not available ({', '.join(sorted(available)) or 'none'} is)"
    return resolve(kernel.supports)(args) if kernel.supports else None


def _show(value: Any) -> str:
    if isinstance(value, TensorSpec):
        sizes = ", ".join("?" if size is None else str(size) for size in value.shape)
        return f"{str(value.dtype)[6:]}[{sizes}]"
    return repr(value)
