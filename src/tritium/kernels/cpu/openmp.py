"""Which OpenMP runtime this process has: torch brings one, and there must never be a second."""

import re
from pathlib import Path

import torch

from tritium.errors import KernelError

_RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


def loaded_runtimes() -> frozenset[str]:
    """Paths of the OpenMP runtimes mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return frozenset(p for p in paths if _RUNTIME.search(p))


def torch_runtime(runtimes: frozenset[str]) -> str:
    """The runtime among `runtimes` that torch uses: the only one, or the one in torch's own directories."""
    if len(runtimes) == 1:
        return next(iter(runtimes))
    site = str(Path(torch.__file__).resolve().parent)
    own = sorted(p for p in runtimes if p.startswith((f"{site}/", f"{site}.libs/")))
    if len(own) != 1:
        raise KernelError(
            f"cannot tell which OpenMP runtime torch uses; loaded: {', '.join(sorted(runtimes)) or 'none'}"
        )
    return own[0]
