"""The kernels compiled for other instruction sets than this machine's: paths that it would not take."""

import ctypes
import functools
import shutil
import tempfile
from pathlib import Path

from tritium.config import cache_dir
from tritium.kernels.cpu import build, isa, openmp

# What the compiler may use: all this machine has (AMX where there is), then one level less each time.
LEVELS = {
    "native": "-march=native",
    "native without amx": "-march=native -mno-amx-tile -mno-amx-bf16 -mno-amx-int8",
    "avx512": "-march=x86-64-v4",
    "avx2": "-march=x86-64-v3",
    "sse": "-march=x86-64-v2",
}
NEEDS = {
    "native without amx": {"amx_int8"},  # else it is the native one
    "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
}
HERE = tuple(name for name in LEVELS if NEEDS.get(name, set()) <= isa.cpu_flags())


# All that the default run wants of "native without amx": they compile in 12 s of CPU time, all kernels in 41.
TWO_KERNELS = ("linear.cpp", "varlen_attention.cpp")


@functools.cache
def compiled(flags: str, sources: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library compiled for the instructions that `flags` name: once, into the cache, whoever wants it.

    sources: these files of csrc alone; none is all.
    """
    runtime = openmp.torch_runtime(openmp.loaded_runtimes())
    with tempfile.TemporaryDirectory() as name:
        for source in sources:
            shutil.copy(build.SOURCE_DIR / source, name)
        folder = Path(name) if sources else None
        cache, options = cache_dir() / "kernels", flags.split()
        path = build.library_path("g++", runtime, cache, folder, instructions=options, progress=lambda _: None)
    return ctypes.CDLL(str(path))
