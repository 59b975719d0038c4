"""Tritium: an LLM inference compiler. The public names, each imported when it is first used (PEP 562)."""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "LLM": "tritium.llm",
    "SamplingParams": "tritium.sampling_params",
    "BuildConfig": "tritium.config",
    "build": "tritium.compiler",
    "Engine": "tritium.engine.engine",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tritium' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
