"""A Jinja environment for templates that nobody has read: transformers' dialect, no access to Python, bounded work.

Jinja's immutable sandbox keeps a template from objects it must not touch. It does not bound time or memory, so here
loops and calls pay from a budget, and whatever can make something large out of little is weighed before it does.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

MAX_TEXT = 1 << 22  # characters in the prompt, or in any text on the way to it
MAX_TURNS = 1_000_000  # loop turns and calls in one rendering
MAX_SECONDS = 5.0
MAX_BITS = 8192  # of a number

_CONSTANT_FILTERS = frozenset({"length", "count", "first", "last", "default", "d"})  # whatever they are given
_SIZED_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap"})
_REFUSED_METHODS = frozenset({"expandtabs", "translate", "maketrans"})  # grow text by a product of two sizes
_REFUSED_GLOBALS = ("lipsum", "cycler")
_WIDE_FIELD = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*:[^{}]*(\d{5}|\{)")  # 10,000 wide, or as wide as an argument


class LimitExceeded(jinja2.TemplateError):
    """A template asked for more time or memory than a prompt can need."""


@dataclass
class Budget:
    """What one rendering may still use."""

    turns: int = field(default_factory=lambda: MAX_TURNS)
    deadline: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)

    def charge(self, turns: int) -> None:
        """Pay for loop turns or calls; raises `LimitExceeded` when the budget or the time is used up."""
        self.turns -= turns
        if self.turns < 0:
            raise LimitExceeded(f"it needs more than {MAX_TURNS} loop turns")
        if time.monotonic() > self.deadline:
            raise LimitExceeded(f"it needs more than {MAX_SECONDS:g} seconds")


budget: ContextVar[Budget] = ContextVar("budget")


def _weight(value: Any, limit: int = MAX_TEXT) -> int:
    """About how many characters `value` has as text. Stops counting beyond `limit`: shared parts can be exponential."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if not isinstance(value, (list, tuple, dict)):
        return 8
    total = 0
    for item in value:
        total += 16 + _weight(item, limit - total)  # 16: walking an item costs more than a character
        if isinstance(value, dict):
            total += _weight(value[item], limit - total)
        if total > limit:
            break
    return total


def _allow(size: int) -> None:
    if size > MAX_TEXT:
        raise LimitExceeded(f"it makes something of more than {MAX_TEXT} characters or elements")


def _allow_bits(size: int) -> None:
    if size > MAX_BITS:
        raise LimitExceeded(f"it makes a number of more than {MAX_BITS} bits")


def _as_text(value: Any) -> Any:
    """`value`, which is about to become text."""
    _allow(_weight(value))
    return value


def _result(value: Any) -> Any:
    """`value`, which a function has just made."""
    _allow(len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0)
    return value


def _allow_numbers(values: Iterable[Any]) -> None:
    for value in values:
        _allow(abs(value) if isinstance(value, int) else 0)  # widths, counts, lengths


def _allow_format(form: str | bytes, values: tuple[Any, ...]) -> None:
    text = form if isinstance(form, str) else form.decode("latin-1")
    if _WIDE_FIELD.search(text):
        raise LimitExceeded("it formats a field wider than 9999 characters")
    _allow(len(text) + (text.count("{") + text.count("%")) * max(map(_weight, values), default=0))


def _allow_replace(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, (str, bytes)) and isinstance(old, type(text)) and isinstance(new, type(text)):
        _allow(len(text) + text.count(old) * len(new))  # type: ignore[arg-type]


def _allow_method(function: Any, values: tuple[Any, ...]) -> None:
    """Weigh a method of a built-in value before it is called."""
    function = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, (str, bytes, int, float)):
        return
    if name in ("format", "format_map") and isinstance(owner, str):
        _allow_format(owner, values)
    elif name == "replace" and len(values) >= 2:
        _allow_replace(owner, values[0], values[1])
    elif name == "join" and values and isinstance(values[0], Sized) and isinstance(owner, (str, bytes)):
        _allow(len(values[0]) * len(owner) + _weight(values[0]))
    else:
        _allow_numbers(values)


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    num_implicit = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)  # keeps the mark by which Jinja passes the environment or the context first
    def limited(*arguments: Any, **keywords: Any) -> Any:
        values = (*arguments[num_implicit:], *keywords.values())
        items = 0 if name in _CONSTANT_FILTERS else sum(len(v) for v in values if isinstance(v, (list, tuple, dict)))
        budget.get().charge(1 + items)
        if name in _SIZED_FILTERS:
            _allow_numbers(values[1:])
            _allow(_weight(values[0]))
        elif name == "format":
            _allow_format(str(values[0]), values[1:])
        elif name == "replace" and len(values) >= 3:
            _allow_replace(str(_as_text(values[0])), values[1], values[2])
        elif name == "join" and isinstance(values[0], Sized):
            _allow(_weight(values[0]) + len(values[0]) * max(map(_weight, values[1:]), default=0))
        elif name in ("string", "pprint", "urlencode", "xmlattr", "escape", "e", "forceescape", "safe"):
            _allow(_weight(values[0]))
        return _result(function(*arguments, **keywords))

    return limited


def _paid_loop(items: Any) -> Any:
    """What a `for` loops over, paid for: at once when its length is known, else turn by turn."""
    if isinstance(items, Sized):
        budget.get().charge(len(items))
        return items
    return _paid_turns(items) if isinstance(items, Iterable) and not isinstance(items, jinja2.Undefined) else items


def _paid_turns(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        budget.get().charge(1)
        yield item


def _concat(pieces: Iterable[str]) -> str:
    pieces = list(pieces)
    _allow(sum(map(len, pieces)))
    return "".join(pieces)


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's tokens for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Any) -> Any:
        """The body in place of the tag, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that every chat template is compiled in; `budget` must be set around compiling and rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_as_text,
            extensions=[Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _limited_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"paid loop": _paid_loop, "as text": _as_text}
        for name in _REFUSED_GLOBALS:
            del self.globals[name]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, "paid loop")
        for text in list(tree.find_all(jinja2.nodes.Concat)):
            text.nodes = [_filtered(node, "as text") for node in text.nodes]
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What a template may look up: what Jinja's sandbox allows, less a few methods of text."""
        return attr not in _REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, function: Any, *arguments: Any, **keywords: Any) -> Any:
        """Every call a template makes: paid for, weighed before and after."""
        budget.get().charge(1)
        values = (*arguments, *keywords.values())
        _allow_numbers(values if function is safe_range else ())
        _allow_method(function, values)
        return _result(super().call(context, function, *arguments, **keywords))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Operators that can make something large out of little."""
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
                    _allow(len(sequence) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _allow_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, (str, bytes)):
            _allow_format(left, right if isinstance(right, tuple) else (right,))
        result = _result(super().call_binop(context, operator, left, right))
        _allow_bits(result.bit_length() if isinstance(result, int) else 0)
        return result


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _TemplateDict:
    """`dict(...)` without the class's own attributes."""

    def __call__(self, *arguments: Any, **keywords: Any) -> dict[Any, Any]:
        return dict(*arguments, **keywords)


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set {name!r} on a namespace")
        super().__setitem__(name, value)
