"""config.json -> ModelConfig. Nothing is allocated here, however absurd the numbers."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritium.errors import CheckpointError, ConfigError
from tritium.models.config import COMPUTE_DTYPES, ModelConfig
from tritium.models.encoder_config import EncoderConfig
from tritium.models.families import find_family
from tritium.models.families.bert import find_encoder
from tritium.models.hf_fields import RESTORE, Fields
from tritium.weights.source import WeightSource

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 10_000_000


def read_encoder_config(
    model_dir: str | Path, *, dtype: str = "auto", source: WeightSource | None = None
) -> EncoderConfig | None:
    """The configuration of an encoder's directory; None for any other model's. Raises as `read_config` does."""
    data, where = _load(model_dir)
    if not isinstance(data, Mapping):
        return None
    has_pooler = source is not None and any(name.endswith("pooler.dense.weight") for name in source.names)
    return parse_encoder_config(data, where, dtype=dtype, has_pooler=has_pooler, source=source)


def parse_encoder_config(
    data: Mapping[str, Any],
    where: str,
    *,
    dtype: str = "auto",
    has_pooler: bool,
    source: WeightSource | None = None,
) -> EncoderConfig | None:
    """The same from the contents of a config.json. has_pooler: the checkpoint has the tensors of one."""
    fields = Fields(data, where)
    family = find_encoder(fields)
    if family is None:
        return None
    found = family.read(fields, has_pooler=has_pooler)
    try:
        return EncoderConfig(**found, dtype=_stored_dtype(fields, source) if dtype == "auto" else dtype)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}; {RESTORE}") from error


def read_config(
    model_dir: str | Path,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    source: WeightSource | None = None,
) -> ModelConfig:
    """The configuration of a model directory.

    dtype "auto" is what config.json says, else that of the first floating-point tensor of `source`, else float32.
    Raises `CheckpointError` naming file, field and value; `UnsupportedModel` for an architecture or feature that no
    built-in model has; `ConfigError` when `dtype` or `max_model_len` cannot be.
    """
    data, where = _load(model_dir)
    return parse_config(data, where, dtype=dtype, max_model_len=max_model_len, source=source)


def _load(model_dir: str | Path) -> tuple[Any, str]:
    """The contents of config.json, and its path for messages."""
    path = Path(model_dir) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file; a model directory has a {CONFIG_FILE} beside its weights, tritium reads "
            "Hugging Face directories"
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{path}: is {path.stat().st_size} bytes long, more than a configuration can be; {RESTORE}"
        )
    try:
        return json.loads(path.read_bytes()), str(path)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); {RESTORE}") from None


def parse_config(
    data: Mapping[str, Any],
    where: str,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    source: WeightSource | None = None,
) -> ModelConfig:
    """The same from the contents of a config.json. `where` names it in messages."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where}: is a JSON {type(data).__name__}, expected an object; {RESTORE}")
    fields = Fields(data, where)
    family = find_family(fields)
    found = family.read(fields)
    compute_dtype = _stored_dtype(fields, source) if dtype == "auto" else dtype
    try:
        config = ModelConfig(**found, family=family.name)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}; {RESTORE}") from error
    return replace(config, dtype=compute_dtype, max_model_len=max_model_len)


def _stored_dtype(fields: Fields, source: WeightSource | None) -> str:
    name, value = fields.get("dtype", "torch_dtype", default=None)
    if value is None and source is not None:
        stored = (source.spec(tensor).dtype for tensor in source.names)
        value = next((dtype for dtype in stored if dtype in (*COMPUTE_DTYPES, "float64")), None)
    if value is None:
        return "float32"
    value = value.removeprefix("torch.") if isinstance(value, str) else value
    if value == "float64":
        return "float32"
    if value not in COMPUTE_DTYPES:
        raise fields.unsupported(name, value, f"models are computed in {', '.join(COMPUTE_DTYPES)}; pass dtype=")
    return value
