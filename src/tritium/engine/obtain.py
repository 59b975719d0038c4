"""From what a user names, an engine directory, a model directory or a hub id, to an engine directory."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub

from tritium.config import BuildConfig
from tritium.engine import cache
from tritium.engine.engine import is_engine
from tritium.engine.manifest import read_manifest
from tritium.errors import CheckpointError, ConfigError

logger = logging.getLogger("tritium")

Build = Callable[[Path, BuildConfig, Path], None]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def obtain_engine(model: str | Path, config: BuildConfig, build: Build) -> Path:
    """The engine directory for `model`, which may be one itself; else built by `build` on first use and cached.

    Raises `ConfigError` when `config` contradicts a given engine, `CheckpointError` when there is nothing at `model`.
    """
    if is_engine(model):
        _check_agrees(Path(model), config)
        return Path(model)
    model_dir = _model_dir(model)
    if config.max_model_len is not None and not _is_length_compiled_in(model_dir):
        config = replace(config, max_model_len=None)  # only the runtime needs it: one engine serves every length
    path = cache.engine_path(model_dir, config)
    with cache.build_lock(path):
        if not is_engine(path):
            logger.warning("building an engine for %s, once, in %s", model, path)
            build(model_dir, config, path)
        cache.touch(path)
    logger.info("engine: %s", path)
    return path


def _model_dir(model: str | Path) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(str(model)) or str(model).count("/") != 1:
        raise CheckpointError(
            f"{model} is neither a model directory, nor an engine directory, nor a hub id like org/name"
        )
    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client raises a dozen classes; each means: it could not be had
        raise CheckpointError(
            f"{model} is no directory here, and could not be fetched from the hub: {error}"
        ) from error


def _is_length_compiled_in(model_dir: Path) -> bool:
    """True when the engine depends on the length it is built for: dynamic RoPE scaling is frozen for it."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # the build will say what is wrong with it
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return isinstance(rope, dict) and "dynamic" in (rope.get("rope_type"), rope.get("type"))


def _check_agrees(path: Path, config: BuildConfig) -> None:
    """An engine is what it is; options that would have made another one are refused, not ignored."""
    manifest = read_manifest(path)
    if config.dtype not in ("auto", manifest.dtype):
        raise ConfigError(f"dtype={config.dtype!r}: the engine {path} computes in {manifest.dtype}; build another one")
    if config.max_model_len is not None and config.max_model_len > manifest.max_model_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len}: the engine {path} was built for {manifest.max_model_len}; "
            "build another one"
        )
