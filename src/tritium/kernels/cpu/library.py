"""The compiled kernel library, called by ctypes: what a wheel brings (`prebuilt`), or csrc/*.cpp compiled on first use.

A kernel is `void tritium_<name>_<dtype>(const Args*)`; see csrc/tritium.h. To add one: a file in csrc/ that ends in
TRITIUM_EXPORT, a `ctypes.Structure` with the same fields, and a bind function that ends in `thunk(...)`.

OpenMP: the library is bound to the very runtime that torch has loaded (two runtimes in a process mean two thread pools
and, at worst, a deadlock), so torch is imported first and no -lgomp is given.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tritium.config import cache_dir, compiler_command, cpu_level
from tritium.errors import KernelError
from tritium.kernels.cpu import build, isa, openmp, prebuilt

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def available() -> bool:
    """True when the compiled kernels can be used; builds them on the first call, which takes seconds."""
    return not why_not()


def why_not() -> str:
    """Why the compiled kernels cannot be used; empty when they can."""
    return _load()[1]


def thunk(name: str, dtype: torch.dtype | None, args: ctypes.Structure, *tensors: torch.Tensor) -> Callable[[], object]:
    """A call of `tritium_<name>_<dtype>(&args)`, without `_<dtype>` when dtype is None.

    The struct and `tensors` (whatever its pointers point into) live as long as the returned callable.
    Raises `KernelError` when there is no library, or when the struct's size is not what the C++ side expects.
    """
    return call(_library(), name, dtype, args, *tensors)


def call(
    library: ctypes.CDLL, name: str, dtype: torch.dtype | None, args: ctypes.Structure, *tensors: torch.Tensor
) -> Callable[[], object]:
    """`thunk` of any library made like this one."""
    expected = getattr(library, f"tritium_{name}_args_size")()
    if ctypes.sizeof(args) != expected:
        raise KernelError(f"{type(args).__name__} has {ctypes.sizeof(args)} bytes, csrc has {expected}: fields differ")
    function = getattr(library, f"tritium_{name}" + (f"_{SUFFIXES[dtype]}" if dtype else ""))
    function.restype = None
    args.keep_alive = tensors
    return functools.partial(function, ctypes.byref(args))


def refuse(tensors: dict[str, Any], dtypes: tuple[torch.dtype, ...] = tuple(SUFFIXES)) -> str | None:
    """What every compiled kernel asks of its arguments: a library, one dtype for all `tensors`, and one that it knows.

    `tensors` maps names to `TensorSpec`s (or tensors); None values are skipped. Returns the reason, None when fine.
    """
    if reason := why_not():
        return reason
    found = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(found.values())) > 1:
        return "the dtypes differ: " + ", ".join(f"{n} is {str(d)[6:]}" for n, d in found.items())
    for name, dtype in found.items():
        if dtype not in dtypes:
            return f"{name} is {str(dtype)[6:]}, which it has no code for"
    return None


def packed_size(num_out: int, num_in: int, dtype: torch.dtype, *, is_gated: bool = False) -> int:
    """Elements that a linear's weight [num_out, num_in] takes when packed (csrc/linear.h)."""
    function = _library().tritium_linear_packed_size
    function.restype, function.argtypes = (
        ctypes.c_int64,
        (
            *(ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_int32, ctypes.c_int32),
        ),
    )
    return function(num_out, num_in, dtype == torch.bfloat16, is_gated)


def quantized_units(num_out: int, num_in: int, bits: int) -> int:
    """32-bit units that a quantised weight [num_out, num_in] takes when packed (csrc/linear_quantized.h)."""
    function = _library().tritium_quantized_units
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)
    return function(num_out, num_in, bits)


def panel_outputs() -> int:
    """Outputs that lie side by side in a packed weight."""
    function = _library().tritium_panel_outputs
    function.restype = ctypes.c_int64
    return function()


def has_tiles() -> bool:
    """True when quantised linears can run on AMX tiles in this process."""
    return bool(_library().tritium_has_tiles())


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise KernelError(f"the compiled kernels cannot be used: {reason}")
    return library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        return load(None), ""
    except (KernelError, OSError) as error:
        return None, str(error)


def load(source_dir: Path | None) -> ctypes.CDLL:
    """The C++ files of a directory, built for this machine unless the cache has them, and loaded.

    None: Tritium's own, as this installation brings them compiled, else built like others.
    Raises `KernelError`, `OSError` when the system cannot load what was built, or `ConfigError` for $TRITIUM_CPU_LEVEL.
    """
    runtimes = openmp.loaded_runtimes()
    runtime = openmp.torch_runtime(runtimes)
    if source_dir is None and (found := prebuilt.path()):
        library = prebuilt.load(found, runtime)
    else:
        library = ctypes.CDLL(str(_build(runtime, source_dir)))
    if extra := openmp.loaded_runtimes() - runtimes:
        raise KernelError(f"loading the kernels brought a second OpenMP runtime: {', '.join(sorted(extra))}")
    return library


def _build(runtime: str, source_dir: Path | None) -> Path:
    level, command = cpu_level(), compiler_command()
    instructions = isa.best(level, isa.cpu_flags()).flags if level else isa.NATIVE
    if not command.strip():
        raise KernelError("no C++ compiler: CXX is empty")
    return build.library_path(
        command, runtime, cache_dir() / "kernels", source_dir, instructions=instructions, progress=_print_progress
    )


def _print_progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
