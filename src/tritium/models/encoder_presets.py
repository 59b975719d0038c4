"""Well-known encoder shapes by name, for `--arch`; rows as in `presets.py`. Published weights of each have a pooler."""

import difflib
from collections.abc import Iterable
from typing import Any

from tritium.errors import ConfigError
from tritium.models.encoder_config import EncoderConfig
from tritium.models.hf_config import parse_encoder_config


def _bert(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": 30_522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        **more,
    }


def _roberta(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    names = {"architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "vocab_size": 50_265}
    positions = {"max_position_embeddings": 514, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return _bert(layers, hidden, heads) | names | positions | more


XLM_ROBERTA = {"architectures": ["XLMRobertaForMaskedLM"], "model_type": "xlm-roberta", "vocab_size": 250_002}
ENCODER_PRESETS: dict[str, dict[str, Any]] = {
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "roberta-base": _roberta(12, 768, 12),
    "roberta-large": _roberta(24, 1024, 16),
    "xlm-roberta-base": _roberta(12, 768, 12, **XLM_ROBERTA),
    "xlm-roberta-large": _roberta(24, 1024, 16, **XLM_ROBERTA),
}


def encoder_preset(name: str, *, dtype: str = "auto") -> EncoderConfig:
    """The configuration of a well-known encoder. Raises `ConfigError` for an unknown name, with the nearest one."""
    if name not in ENCODER_PRESETS:
        raise unknown("encoder", name, ENCODER_PRESETS)
    found = parse_encoder_config(ENCODER_PRESETS[name], f"preset {name}", dtype=dtype, has_pooler=True)
    assert found is not None
    return found


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that no row has."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")
