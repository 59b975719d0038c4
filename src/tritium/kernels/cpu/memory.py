"""Memory for packed weights, in huge pages where the system has them."""

import ctypes
import mmap

import torch

HUGE_PAGE = 1 << 21  # bytes; on x86-64, and the usual one on ARM
_libc = ctypes.CDLL(None)


def for_packed(count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` elements with no values yet.

    The system hands out memory page by page when it is first written: 0.42 s of CPU time a GB in pages of 4 KiB, 0.18
    in huge ones (2 x Emerald Rapids, Linux 6.18), which is most of what packing takes. Where the system refuses, the
    pages are small, and nothing else differs.
    """
    data = torch.empty(count, dtype=dtype)
    begin = -(-data.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = data.data_ptr() + data.nbytes - begin
    if length >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return data
