"""The kernels that a wheel brings compiled, one shared object for each level of `isa.LEVELS`.

They name no OpenMP runtime of their own: what they call of it is found in the one that torch has loaded, which is made
visible to them. (A wheel's tools would bundle a second libgomp; two runtimes are two pools of threads.)
"""

import ctypes
from pathlib import Path

from tritium.config import cpu_level
from tritium.kernels.cpu import isa

DIRECTORY = Path(__file__).parent / "prebuilt"


def path() -> Path | None:
    """The object for this CPU, or for $TRITIUM_CPU_LEVEL; None where this installation has none.

    Raises `ConfigError` as `isa.best` does.
    """
    if not DIRECTORY.is_dir():
        return None
    found = DIRECTORY / f"{isa.best(cpu_level(), isa.cpu_flags()).name}.so"
    return found if found.is_file() else None


def load(path: Path, openmp_runtime: str) -> ctypes.CDLL:
    """The object at `path`, bound to the OpenMP runtime at the path `openmp_runtime`, which is loaded already."""
    ctypes.CDLL(openmp_runtime, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))
