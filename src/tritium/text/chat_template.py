"""Chat templates: a conversation becomes the prompt text its model was trained on, as in transformers."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import jinja2

from tritium.errors import CheckpointError, RequestError
from tritium.text.template_sandbox import Budget, LimitExceeded, TemplateEnvironment, budget

MAX_SOURCE = 1 << 18  # characters in a template; the longest published ones have about 20,000
MAX_DEPTH = 32  # nesting of a message, a tool or a variable
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One Jinja template, compiled on first use."""

    def __init__(self, source: str, *, name: str = "default") -> None:
        self.source = source
        self.name = name

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text of `messages`, each with a `role` and mostly a `content`.

        Raises `RequestError` when the template refuses the conversation or needs too much time or text for it, and
        `CheckpointError` when the template itself is broken.
        """
        compiled = self._compiled
        conversation = [_as_message(message, index) for index, message in enumerate(_as_list("messages", messages))]
        if not conversation:
            raise RequestError("messages must hold at least one message")
        values = {
            **{name: _plain(value, name) for name, value in variables.items()},
            "messages": conversation,
            "tools": None if tools is None else _plain(_as_list("tools", tools), "tools"),
            "documents": _plain(variables.get("documents"), "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        token = budget.set(Budget())
        try:
            return compiled.render(values)
        except LimitExceeded as error:
            raise RequestError(f"the chat template was stopped: {error}") from error
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses this conversation: {error}") from error
        except RecursionError as error:
            raise RequestError("the chat template was stopped: it calls itself too deeply") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError) as error:
            raise RequestError(
                f"the chat template fails on this conversation: {type(error).__name__}: {error}"
            ) from error
        finally:
            budget.reset(token)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if len(self.source) > MAX_SOURCE:
            raise CheckpointError(
                f"chat template {self.name!r} has {len(self.source)} characters; at most {MAX_SOURCE} are allowed"
            )
        token = budget.set(Budget())  # constant expressions are computed while compiling
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"chat template {self.name!r}, line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise CheckpointError(f"chat template {self.name!r} cannot be compiled: {error}") from error
        finally:
            budget.reset(token)


@lru_cache(maxsize=1)
def _environment() -> TemplateEnvironment:
    return TemplateEnvironment()


def _as_list(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"{name} must be a list, not {type(value).__name__}")
    return value


def _as_message(message: object, index: int) -> dict[str, Any]:
    """One message as plain data, without its None values: templates test for keys, not for None."""
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{index}] must be an object with a role, not {message!r:.80}")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{index}] needs a role (text), not {message.get('role')!r:.80}")
    plain = {key: _plain(value, f"messages[{index}].{key}") for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` made of JSON's types only, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth == MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}; only text, numbers, lists and objects can be rendered")
