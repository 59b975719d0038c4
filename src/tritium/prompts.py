"""What counts as a prompt, or many."""

from collections.abc import Sequence
from typing import Any

from tritium.errors import RequestError

Prompt = str | Sequence[int]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt becomes a list of one. Arrays (numpy, torch) count as the lists they hold."""
    prompts = _as_list(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise RequestError(f"prompts must be text, a list of token ids or a list of those, not {prompts!r:.100}")
    many = [_as_list(prompt) for prompt in prompts]
    if many and all(isinstance(item, int) for item in many):
        return [many]
    for i, prompt in enumerate(many):
        if not isinstance(prompt, (str, list, tuple)):
            raise RequestError(f"prompts[{i}] must be text or a list of token ids, not {prompt!r:.100}")
    return many


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
