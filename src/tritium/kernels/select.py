"""Choosing a kernel for a step: the row a plan prefers, else the first that is available and supports the arguments."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from tritium.errors import KernelError
from tritium.kernels.kernel import Kernel, Scalar, Tactic, TensorSpec, resolve
from tritium.kernels.table import KERNELS


def choose(
    op: str,
    args: Mapping[str, Any],
    *,
    available: Set[str],
    preferred: str = "",
    extra: Sequence[Kernel] = (),
    is_bitwise: bool = False,
) -> Kernel:
    """The kernel for `op` with these `TensorSpec`s and literals among the backends in `available`.

    extra: rows of plugins, which stand before those of the table. is_bitwise: take only a kernel by which a row's bits
    do not depend on its neighbours, however many there are.

    That is the row named `preferred`, if it can run here, else the first of the table that can. An eager row is never
    preferred: that a plan names one only says that where it was built nothing better could run.

    Raises `KernelError` with every kernel that was tried and why it was refused.
    """
    rows = [kernel for kernel in (*extra, *KERNELS) if kernel.op == op]
    rows.sort(key=lambda kernel: kernel.name != preferred or kernel.backend == "eager")
    refusals = []
    for kernel in rows:
        reason = _refusal(kernel, args, available) or (variance(kernel) if is_bitwise else None)
        if reason is None:
            return kernel
        refusals.append(f"  {kernel.name}: {reason}")
    call = f"{op}({', '.join(f'{name}={_show(value)}' for name, value in args.items())})"
    if not rows:
        raise KernelError(
            f"no kernel implements {call}: add a row to kernels/table.py, or write the model with its ops"
        )
    raise KernelError(f"no kernel can run {call}. Tried:\n" + "\n".join(refusals))


def valid_kernels(
    op: str, args: Mapping[str, Any], *, available: Set[str], extra: Sequence[Kernel] = ()
) -> list[Kernel]:
    """Every kernel for `op` that can run these arguments, in order of preference."""
    rows = [kernel for kernel in (*extra, *KERNELS) if kernel.op == op]
    return [kernel for kernel in rows if _refusal(kernel, args, available) is None]


def valid_tactics(kernel: Kernel, args: Mapping[str, Any]) -> list[Tactic]:
    """Every tactic by which a kernel that can run these arguments can run them here, its default first."""
    return [dict(one) for one in kernel.tactics or ({},) if refuse_tactic(kernel, args, one) is None]


def refuse_tactic(kernel: Kernel, args: Mapping[str, Any], tactic: Mapping[str, Scalar]) -> str | None:
    """Why it cannot run them by this tactic; None: it can. An empty tactic is the default."""
    if not tactic or tactic == next(iter(kernel.tactics), None):
        return None
    if tactic not in kernel.tactics:
        return f"{kernel.name} has no such tactic"
    return resolve(kernel.supports_tactic)(args, tactic) if kernel.supports_tactic else None


def _refusal(kernel: Kernel, args: Mapping[str, Any], available: Set[str]) -> str | None:
    if kernel.backend not in available:
        return f"backend {kernel.backend} is not available ({', '.join(sorted(available)) or 'none'} is)"
    return resolve(kernel.supports)(args) if kernel.supports else None


def variance(kernel: Kernel) -> str | None:
    """Why it cannot run where a row's bits must not depend on its neighbours; None: it can."""
    is_invariant = kernel.is_invariant and kernel.row_multiple == 1
    return None if is_invariant else "a row's bits depend on the batch, and invariance='bitwise' was asked for"


def _show(value: Any) -> str:
    if isinstance(value, TensorSpec):
        sizes = ", ".join("?" if size is None else str(size) for size in value.shape)
        return f"{str(value.dtype)[6:]}[{sizes}]"
    return repr(value)
