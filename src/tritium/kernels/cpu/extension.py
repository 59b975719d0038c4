"""C++ of one's own, compiled like Tritium's kernels: the same flags, `tritium.h`, private cache and ctypes call."""

import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from tritium.config import cache_dir
from tritium.errors import KernelError
from tritium.kernels.cpu import build, library


class Extension:
    """C++ source, compiled on first use. It includes "tritium.h" and ends in TRITIUM_EXPORT(name, Args) lines."""

    def __init__(self, source: str) -> None:
        self._source = source

    def refuse(self, tensors: dict[str, Any], dtypes: tuple[torch.dtype, ...] = tuple(library.SUFFIXES)) -> str | None:
        """Why it cannot run: as `library.refuse`, and the compiler's words when the source does not compile."""
        return library.refuse(tensors, dtypes) or _load(self._source)[1] or None

    def thunk(
        self, name: str, dtype: torch.dtype | None, args: ctypes.Structure, *tensors: torch.Tensor
    ) -> Callable[[], object]:
        """A call of `tritium_<name>_<dtype>(&args)`; see `library.thunk`."""
        loaded, reason = _load(self._source)
        if loaded is None:
            raise KernelError(f"a plugin's C++ cannot be used: {reason}")
        return library.call(loaded, name, dtype, args, *tensors)


@functools.cache
def _load(source: str) -> tuple[ctypes.CDLL | None, str]:
    """The compiled source, or why there is none."""
    if reason := library.why_not():
        return None, reason
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    directory = cache_dir() / "kernels" / f"source-{digest}"
    try:
        build.make_private(directory)  # its parent is: tritium's own kernels are loaded from there
        path = directory / "plugin.cpp"
        if not path.is_file() or path.read_text() != source:
            partial = directory / f".{os.getpid()}.{threading.get_ident()}"
            partial.write_text(source)
            partial.rename(path)
        return library.load(directory), ""
    except (KernelError, OSError) as error:
        return None, str(error)
