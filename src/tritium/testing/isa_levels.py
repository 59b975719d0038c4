"""The kernels compiled for other instruction sets than this machine's: paths that it would not take."""

import ctypes
import functools
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from tritium.config import cache_dir
from tritium.kernels.cpu import build, openmp

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
CPU_FLAGS = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
HERE = tuple(name for name in LEVELS if NEEDS.get(name, set()) <= CPU_FLAGS)


# All that the default run wants of "native without amx": they compile in 12 s of CPU time, all kernels in 41.
TWO_KERNELS = ("linear.cpp", "varlen_attention.cpp")


@functools.cache
def compiled(flags: str, sources: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library compiled with `flags` in place of -march=native: once, into the cache, whoever wants it.

    sources: these files of csrc alone; none is all.
    """
    place = build.FLAGS.index("-march=native")  # where it stands: the native level is then the library itself
    chosen = (*build.FLAGS[:place], *flags.split(), *build.FLAGS[place + 1 :])
    runtime = openmp.torch_runtime(openmp.loaded_runtimes())
    with tempfile.TemporaryDirectory() as name, mock.patch.object(build, "FLAGS", chosen):
        for source in sources:
            shutil.copy(build.SOURCE_DIR / source, name)
        folder = Path(name) if sources else None
        path = build.library_path("g++", runtime, cache_dir() / "kernels", folder, progress=lambda _: None)
    return ctypes.CDLL(str(path))
