"""config.json files in tests: read, cut, refused."""

from collections.abc import Mapping
from typing import Any

import pytest

from tritium import models
from tritium.errors import CheckpointError, TritiumError
from tritium.testing.tiny_configs import TINY_MODELS

WHERE = "dir/config.json"
ODD_VALUES = ([1, 2], {"a": 1}, "rope", 0.1, -3, 10**30, None, True, float("nan"), "")


def parse(config: Mapping[str, Any], **more: Any) -> models.ModelConfig:
    """The configuration that these fields describe."""
    return models.parse_config(config, WHERE, **more)


def without(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The fields but these."""
    return {name: value for name, value in config.items() if name not in names}


def error_of(config: Mapping[str, Any], kind: type[TritiumError] = CheckpointError) -> str:
    """The message with which these fields are refused, which must name the file."""
    with pytest.raises(kind) as caught:
        parse(config)
    assert str(caught.value).startswith(f"{WHERE}: ")
    return str(caught.value)


def check_published(content: Mapping[str, Any], **expected: Any) -> None:
    """Assert fields of what a published config.json is read as."""
    config = parse(content)
    assert {field: getattr(config, field) for field in expected} == expected


def check_odd_values(name: str, odd: object) -> None:
    """Assert that this value in any field of a tiny model is read, or refused with the field's name."""
    for field in TINY_MODELS[name]:
        try:
            models.create(parse(TINY_MODELS[name] | {field: odd}))
        except TritiumError as error:
            assert field in str(error) or "archit" in str(error)
