"""Opens a model for the commands that run one, and says what was resolved."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tritium.config import available_threads
from tritium.llm import LLM


def resolved_config(llm: LLM) -> dict[str, Any]:
    """Everything that was decided when `llm` was opened, by the user, by default or by the memory there is."""
    manifest, limits = llm.engine.manifest, llm.limits
    return {
        "engine": str(llm.engine.path),
        "model": manifest.model.get("name", ""),
        "architecture": manifest.model.get("architecture", ""),
        "dtype": manifest.dtype,
        "invariance": manifest.invariance,
        "tensor_parallel": manifest.mapping.get("tensor_parallel"),
        **asdict(llm.config),
        "max_model_len": limits.max_model_len,
        "num_threads": llm.config.num_threads or available_threads(),
        "kv_blocks": limits.num_blocks - 1,
    }


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a person: what is not set is left out."""
    return {name: value for name, value in config.items() if value not in (None, "")}
