"""Fields of OpenAI's protocol that endpoints share: converted strictly, and said by their names when they are wrong."""

from collections.abc import Mapping
from typing import Any

import msgspec

from tritium.server.api_error import ApiError


def convert(sent: Mapping[str, Any], schema: type[Any]) -> Any:
    """The fields as a `schema`. Raises `ApiError` that names the one that is wrong or missing."""
    try:
        return msgspec.convert(sent, schema, strict=True)
    except msgspec.ValidationError as error:
        raise ApiError(400, _plain(str(error)), param=_field_of(str(error))) from error


def one_or_many(value: Any, param: str) -> list[Any]:
    """Text, token ids, or a list of either, as a list: all text or all token ids. Raises `ApiError` for a mixture."""
    many = value if isinstance(value, list) else [value]
    kinds = {type(item) for item in many}
    if len(kinds) != 1:
        problem = "is empty" if not many else "mixes text and token ids"
        raise ApiError(400, f"{param} {problem}: send text, token ids, or a list of either", param=param)
    return [many] if kinds == {int} else many


def _plain(message: str) -> str:
    """msgspec's message, its path spelled as a field: "Expected `int`, got `str` - at `$.n`"."""
    return message.replace("`$.", "`").replace("`$", "`")


def _field_of(message: str) -> str | None:
    """The field that msgspec's message points at, or says is missing."""
    for mark in ("at `$.", "required field `"):
        if mark in message:
            return message.split(mark, 1)[1].split("`")[0].split(".")[0].split("[")[0]
    return None
