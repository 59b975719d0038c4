"""Tritium: an LLM inference compiler. The public names, each imported when it is first used (PEP 562)."""

import gc
import os
from importlib import import_module

# libgomp's threads spin for about a millisecond at every barrier. On two cores shared with one other busy process the
# demo model then made 6 tokens/s, and 443 with this bound of some 30 µs (2 x Zen 4, dev/LOG-2026-11-23.md). libgomp
# reads it when torch is imported: a program that imports torch before tritium has to set it itself.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"

_HOME = {
    "LLM": "tritium.llm",
    "SamplingParams": "tritium.sampling_params",
    "BeamSearchParams": "tritium.sampling_params",
    "BuildConfig": "tritium.config",
    "OptimizationProfile": "tritium.config",
    "build": "tritium.compiler",
    "quantize": "tritium.quantizer",
    "Engine": "tritium.engine.engine",
    "Plugin": "tritium.kernels.plugin",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tritium' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    was_collecting = gc.isenabled()
    gc.disable()  # what modules make stays: looking through it for garbage is a fifth of torch's import
    try:
        return getattr(import_module(_HOME[name]), name)
    finally:
        if was_collecting:
            gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)
