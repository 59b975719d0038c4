"""From what a user names, an engine directory, a model directory or a hub id, to an engine directory."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tritium.config import BuildConfig
from tritium.engine import cache
from tritium.engine.manifest import TACTICS_NAME, Manifest, is_engine, rank_directory, read_manifest
from tritium.errors import ConfigError
from tritium.weights.hub import model_directory

logger = logging.getLogger("tritium")

Build = Callable[[Path, BuildConfig, Path], None]


def obtain_engine(model: str | Path, config: BuildConfig, build: Build, *, plugins: Sequence[str] = ()) -> Path:
    """The engine directory for `model`, which may be one itself; else built by `build` on first use and cached. Of one
    that ranks share, the first rank's, beside which the others' are.

    plugins: what tells the plugins it is built with from others.

    Raises `ConfigError` when `config` contradicts a given engine, `CheckpointError` when there is nothing at `model`.
    """
    if is_engine(model):
        path = rank_directory(model)
        _check_agrees(path, config)
        return path
    model_dir = model_directory(model)
    if config.max_model_len is not None and not _is_length_compiled_in(model_dir, config.max_model_len):
        config = replace(config, max_model_len=None)  # only the runtime needs it: one engine serves every length
    path = cache.engine_path(model_dir, config, plugins)
    with cache.build_lock(path):
        if not is_engine(path):
            logger.warning("building an engine for %s, once, in %s", model, path)
            build(model_dir, config, path)
        cache.touch(path)
        if config.tune != "none":
            _check_tuned(path, config, read_manifest(path))  # it may be one whose tuning has failed
    logger.info("engine: %s", path)
    return rank_directory(path)


def _is_length_compiled_in(model_dir: Path, max_model_len: int) -> bool:
    """True when an engine of the model's own length would not do.

    Dynamic RoPE scaling is frozen for a length; and a length beyond what config.json claims must reach the build, which
    allows it (rotary positions do not end) or refuses it (learned ones do).
    """
    if (model_dir / "sentence_bert_config.json").is_file():
        return True  # it may say a shorter length than the model's
    try:
        folder = model_dir if model_dir.is_dir() else model_dir.parent
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        return False  # the build will say what is wrong with it
    claimed = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(claimed, int) and max_model_len > claimed:
        return True
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return isinstance(rope, dict) and "dynamic" in (rope.get("rope_type"), rope.get("type"))


def _check_tuned(path: Path, config: BuildConfig, manifest: Manifest) -> None:
    """Raise `ConfigError` for an engine that should be tuned and is not."""
    if config.tune != "none" and TACTICS_NAME not in manifest.files:
        blocks = "" if config.tune_block_size is None else f" --block-size {config.tune_block_size}"
        raise ConfigError(
            f"tune={config.tune!r}: the engine {path} is not tuned; run `tritium tune {path} --effort {config.tune}"
            f"{blocks}`"
        )


def _check_agrees(path: Path, config: BuildConfig) -> None:
    """An engine is what it is; options that would have made another one are refused, not ignored."""
    manifest = read_manifest(path)
    if config.dtype not in ("auto", manifest.dtype):
        raise ConfigError(f"dtype={config.dtype!r}: the engine {path} computes in {manifest.dtype}; build another one")
    if config.invariance not in (None, manifest.invariance):
        raise ConfigError(
            f"invariance={config.invariance!r}: the engine {path} is {manifest.invariance}; build another"
        )
    if config.scheme not in (None, manifest.scheme):
        raise ConfigError(
            f"scheme={config.scheme!r}: the engine {path} was built with {manifest.scheme!r}; build another"
        )
    if config.device != "cpu" and config.device != manifest.backend:
        raise ConfigError(f"device={config.device!r}: the engine {path} is for {manifest.backend!r}; build another one")
    if config.tensor_parallel not in (1, num_ranks := manifest.mapping.get("tensor_parallel", 1)):
        raise ConfigError(
            f"tensor_parallel={config.tensor_parallel}: the engine {path} is for {num_ranks} ranks; build another one"
        )
    kept = manifest.build.get("kv_dtype", "auto")
    if config.kv_dtype not in ("auto", kept):
        raise ConfigError(f"kv_dtype={config.kv_dtype!r}: the engine {path} was built with {kept!r}; build another")
    _check_tuned(path, config, manifest)
    if config.quantize_embedding and not manifest.build.get("quantize_embedding", False):
        raise ConfigError(f"quantize_embedding=True: the engine {path} was built without it; build another")
    if config.unquantized and list(config.unquantized) != manifest.build.get("unquantized"):
        raise ConfigError(
            f"unquantized={config.unquantized!r}: the engine {path} was built with "
            f"{manifest.build.get('unquantized')!r}; build another"
        )
    if config.disabled_passes and list(config.disabled_passes) != manifest.build.get("disabled_passes"):
        raise ConfigError(
            f"disabled_passes={config.disabled_passes!r}: the engine {path} was built with "
            f"{manifest.build.get('disabled_passes')!r}; build another"
        )
    if config.max_model_len is not None and config.max_model_len > manifest.max_model_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len}: the engine {path} was built for {manifest.max_model_len}; "
            "build another one"
        )
