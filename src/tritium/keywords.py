"""Unknown keyword arguments of a value's constructor are refused with the nearest known name."""

import difflib
import functools
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar

from tritium.errors import TritiumError

C = TypeVar("C", bound=type)


def refuse_unknown(error: type[TritiumError]) -> Callable[[C], C]:
    """Decorates a dataclass: an unknown keyword raises `error` instead of a bare TypeError."""

    def decorate(cls: C) -> C:
        make = cls.__init__  # type: ignore[misc]
        known = [f.name for f in fields(cls)]

        @functools.wraps(make)
        def __init__(self: object, *args: Any, **keywords: Any) -> None:
            check_known(keywords, known, error)
            make(self, *args, **keywords)

        cls.__init__ = __init__  # type: ignore[misc]
        return cls

    return decorate


def check_known(names: Iterable[str], known: Iterable[str], error: type[TritiumError]) -> None:
    """Raise `error` for the first of `names` that is not in `known`, with the nearest that is."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise error(f"unknown option {name!r}; {hint}")
