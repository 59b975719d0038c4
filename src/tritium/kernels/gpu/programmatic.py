"""Programmatic dependent launch of Triton kernels: one may start before the kernel in front of it has ended.

Its blocks take their places while the last of that kernel's still run, and wait at `begin` until everything it wrote is
there. A kernel behind that does not depend on it in its first instructions (linear_fp8.cu: it loads weights) gains more
than the launch. Needs compute capability 9.0.
"""

from functools import cache

import torch
import triton
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(IS_EARLY: tl.constexpr):
    """The first statement of a kernel that is launched with `launch_options`."""
    if IS_EARLY:
        gdc_launch_dependents()  # first: what follows may take its place, too, before the kernel in front has ended
        gdc_wait()


@cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """IS_EARLY for the kernel, and the launch's own option where the device knows it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"IS_EARLY": True, "launch_pdl": True}
    return {"IS_EARLY": False}
