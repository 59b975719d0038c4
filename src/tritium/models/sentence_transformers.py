"""What a sentence-transformers directory says beside its model: pooling, normalisation, the longest text.

modules.json                  the parts, in order: Transformer, Pooling, perhaps Normalize
<part>/config.json            of the pooling
sentence_bert_config.json     max_seq_length
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tritium.errors import CheckpointError, UnsupportedModel
from tritium.models.hf_fields import MAX_SIZE, Fields

Pooling = Literal["cls", "mean", "last", "pooler"]
MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
NEW_MODES: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
KNOWN = "Transformer, Pooling (cls, mean or lasttoken) and Normalize"
MAX_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """pooling: how token embeddings become one. is_normalized: to length 1. max_len: in tokens; None: the model's."""

    pooling: Pooling = "cls"
    is_normalized: bool = True
    max_len: int | None = None


def read_sentence_config(model_dir: Path) -> SentenceConfig:
    """The directory's configuration; without modules.json the first token's embedding, normalised.

    Raises `CheckpointError` naming file and field, `UnsupportedModel` for a part that no built-in model has.
    """
    path = model_dir / "modules.json"
    if not path.is_file():
        return SentenceConfig()
    parts = _read(path)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path}: is {str(parts)[:200]}, expected a list of modules; restore the published file")
    kinds = [str(part.get("type")).rpartition(".")[2] for part in parts]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedModel(f"{path}: has the modules {', '.join(kinds)}; supported are {KNOWN}, in this order")
    if parts[0].get("path"):
        raise UnsupportedModel(f"{path}: keeps its Transformer in {parts[0]['path']!r}; move those files up beside it")
    return SentenceConfig(
        pooling=_pooling(model_dir, parts[1].get("path")),
        is_normalized="Normalize" in kinds,
        max_len=_max_len(model_dir / "sentence_bert_config.json"),
    )


def _pooling(model_dir: Path, folder: object) -> Pooling:
    if not isinstance(folder, str) or Path(folder).name != folder or folder in ("", ".", ".."):
        raise CheckpointError(f"{model_dir / 'modules.json'}: the Pooling's path {folder!r} is no folder beside it")
    path = model_dir / folder / "config.json"
    fields = Fields(_object(path), str(path))
    if "pooling_mode" in fields.data:
        mode = fields.get("pooling_mode")[1]
        if mode not in NEW_MODES:
            raise fields.unsupported("pooling_mode", mode, f"supported are {', '.join(NEW_MODES)}")
        return NEW_MODES[mode]
    chosen = [name for name in fields.data if name.startswith("pooling_mode_") and fields.boolean(name)]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise UnsupportedModel(
            f"{path}: pools by {', '.join(chosen) or 'nothing'}; supported is one of {', '.join(MODES)}"
        )
    return MODES[chosen[0]]


def _max_len(path: Path) -> int | None:
    if not path.is_file():
        return None
    return Fields(_object(path), str(path)).optional_integer("max_seq_length", low=2, high=MAX_SIZE)


def _object(path: Path) -> Mapping[str, Any]:
    data = _read(path)
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path}: is a JSON {type(data).__name__}, expected an object; restore the published file"
        )
    return data


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are more than a configuration can be")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); restore the published file") from None
