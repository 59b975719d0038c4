"""The memory plan: one byte offset for every temporary of a plan, computed once, with plain integers.

Two temporaries share bytes only when no step needs both, or when the step that writes the one reads the other for the
last time and element by element (`IN_PLACE`): a residual sum takes the place of a summand. Offsets are made for the
largest batch; a smaller one uses the beginning of each place, so addresses never change while an engine runs.
"""

import bisect
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from tritium.engine.plan import Arg, Extent, Plan, Ref, Sizes, Step, Value
from tritium.errors import EngineError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
ITEM_SIZES = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4,
    "float64": 8, "float8_e4m3fn": 1, "complex64": 8,
}  # fmt: skip

# By op: which output may lie where which arguments do. Every kernel of these ops reads an element of the argument
# before it writes that element of the output, and never after.
IN_PLACE: dict[str, tuple[int, tuple[str, ...]]] = {
    **{f"aten.{name}.Tensor": (0, ("self", "other")) for name in ("add", "sub", "mul", "div")},
    **{f"aten.{name}.Scalar": (0, ("self",)) for name in ("add", "sub", "mul", "div")},
    "add_rms_norm": (1, ("residual", "x")),
    "add_layer_norm": (1, ("residual", "x")),
    "quantized_add_rms_norm": (1, ("residual", "x")),
    "quantized_add_layer_norm": (1, ("residual", "x")),
}


class Lifetime(NamedTuple):
    """first: the step that writes the value; last: the last that reads it (for an output, the number of steps)."""

    first: int
    last: int


class Arena(NamedTuple):
    """offsets: bytes from the arena's start, by temporary, multiples of `ALIGNMENT`. total: bytes needed in all."""

    offsets: dict[str, int]
    total: int


def plan_arena(plan: Plan, largest: Sizes) -> Arena:
    """Place every temporary of `plan` for batches up to `largest`; what is computed in place has its argument's offset.

    Several orders are tried, with and without places that are shared so, until an arena is no larger than what one step
    needs; else the smallest is taken. Raises `EngineError` when a step reads a temporary that no step has written.
    """
    lifetimes = find_lifetimes(plan)
    sizes = {v.name: _num_bytes(v.dtype, v.shape, largest) for v in plan.values if v.name in lifetimes}
    sharings: tuple[dict[str, str], ...] = (
        {},
        _in_place(plan, lifetimes),
        _in_place(plan, lifetimes, is_last_first=True),
    )
    lives = [_lives(lifetimes, owners) for owners in sharings]
    least = min(_most_at_once(places, sizes, len(plan.steps)) for places in lives)
    smallest: Arena | None = None
    for is_longest_first in (False, True):
        for owners, places in zip(sharings, lives, strict=True):
            offsets, total = _place(places, sizes, is_longest_first=is_longest_first)
            if smallest is None or total < smallest.total:
                smallest = Arena(offsets | {name: offsets[owner] for name, owner in owners.items()}, total)
            if total == least:
                return smallest
    assert smallest is not None
    return smallest


def _lives(lifetimes: Mapping[str, Lifetime], owners: Mapping[str, str]) -> dict[str, Lifetime]:
    """How long each place is needed: as long as the last value that is computed in it."""
    lives = {name: life for name, life in lifetimes.items() if name not in owners}
    for name, owner in owners.items():  # in the order of the steps
        lives[owner] = Lifetime(lives[owner].first, lifetimes[name].last)
    return lives


def _most_at_once(lives: Mapping[str, Lifetime], sizes: Mapping[str, int], num_steps: int) -> int:
    """Bytes that are needed at one time, at most; time runs from the first step to behind the last."""
    changes = [0] * (num_steps + 2)
    for name, life in lives.items():
        changes[life.first] += sizes[name]
        changes[life.last + 1] -= sizes[name]
    return max(itertools.accumulate(changes))


def _place(lives: Mapping[str, Lifetime], sizes: Mapping[str, int], *, is_longest_first: bool) -> Arena:
    """Each at the lowest offset that is free during its whole life."""

    def order(name: str) -> tuple[int, Lifetime, str]:
        steps = lives[name].last - lives[name].first + 1 if is_longest_first else 1
        return -sizes[name] * steps, lives[name], name

    placed: list[tuple[int, int, Lifetime]] = []  # offset, end, lifetime; sorted by offset
    offsets: dict[str, int] = {}
    for name in sorted(lives, key=order):
        life = lives[name]
        offset, size = 0, sizes[name]
        for start, end, other in placed:
            if other.last < life.first or life.last < other.first:
                continue
            if offset + size <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
        bisect.insort(placed, (offset, offset + size, life), key=lambda place: place[:2])
    return Arena(offsets, max((end for _, end, _ in placed), default=0))


def _in_place(plan: Plan, lifetimes: Mapping[str, Lifetime], *, is_last_first: bool = False) -> dict[str, str]:
    """By temporary that is computed in the place of another: the first that had this place.

    is_last_first: where several arguments may give their place, the last named does.
    """
    owners: dict[str, str] = {}
    for index, step in enumerate(plan.steps):
        output, arguments = IN_PLACE.get(step.op, (0, ()))
        for argument in reversed(arguments) if is_last_first else arguments:
            arg = step.args.get(argument)
            taken = arg.value if isinstance(arg, Ref) else ""
            is_last = taken in lifetimes and lifetimes[taken].last == index
            if is_last and _are_alike(plan, taken, step.outputs[output]) and not _is_viewed(plan, step, taken):
                owners[step.outputs[output]] = owners.get(taken, taken)
                break
    return owners


def _are_alike(plan: Plan, *names: str) -> bool:
    return len({(plan.value(name).dtype, plan.value(name).shape) for name in names}) == 1


def _is_viewed(plan: Plan, step: Step, name: str) -> bool:
    """True when the step reads a view of the value: perhaps other elements of it than it is about to write."""
    return any(read != name and _root(plan.by_name, read) == name for read in _reads(step))


def find_lifetimes(plan: Plan) -> dict[str, Lifetime]:
    """When each temporary is needed; a view keeps what it looks at alive; one never read lives for its own step.

    What the steps over sampled rows read of all tokens lives to the end: they may be run again, over other rows.
    """
    values = plan.by_name

    def base(name: str) -> str:
        return _root(values, name)

    lifetimes: dict[str, Lifetime] = {}
    for index, step in enumerate(plan.steps):
        for name in _reads(step):
            _extend(lifetimes, base(name), index, step, is_temp=values[base(name)].kind == "temp")
        for name in step.outputs:
            if values[name].kind == "temp":
                lifetimes.setdefault(name, Lifetime(index, index))
    rows_read = [base(name) for step in plan.steps if step.phase == "rows" for name in _reads(step)]
    crossing = [n for n in rows_read if n in lifetimes and plan.steps[lifetimes[n].first].phase == "tokens"]
    for name in [*map(base, plan.results), *crossing]:
        if name in lifetimes:
            lifetimes[name] = Lifetime(lifetimes[name].first, len(plan.steps))
    return lifetimes


def _root(values: Mapping[str, Value], name: str) -> str:
    """The value that a chain of views looks at."""
    while values[name].kind == "view":
        name = values[name].base
    return name


def _extend(lifetimes: dict[str, Lifetime], name: str, index: int, step: Step, *, is_temp: bool) -> None:
    if name in lifetimes:
        lifetimes[name] = Lifetime(lifetimes[name].first, index)
    elif is_temp:
        raise EngineError(
            f"step {index} ({step.op}) reads {name!r} before it is written: the plan is damaged; build it again"
        )


def _reads(step: Step) -> list[str]:
    return [ref.value for arg in step.args.values() for ref in _refs(arg)]


def _refs(arg: Arg) -> list[Ref]:
    if isinstance(arg, list):
        return [item for item in arg if isinstance(item, Ref)]
    return [arg] if isinstance(arg, Ref) else []


def _num_bytes(dtype: str, shape: tuple[str | int, ...], sizes: Sizes) -> int:
    elements = math.prod(Extent.parse(dim).at(sizes) for dim in shape)
    return max(ALIGNMENT, -(-elements * ITEM_SIZES[dtype] // ALIGNMENT) * ALIGNMENT)
