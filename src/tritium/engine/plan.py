"""The plan: what the executor runs, as plain data.

A plan is a flat list of steps over named values. A value is one of

    input    written by the runtime before each step (token ids, positions, block tables, ...)
    weight   a tensor of the engine
    kv       one layer's part of the paged KV cache
    temp     lives in the arena between two steps
    view     another value seen with other sizes or strides; costs nothing at run time

Sizes are linear in the batch: `Extent` is `a·T + c·R + b·S + d` with T tokens, R sampled rows, S sequences. In the plan
of a stateless module (`kind` "module") T counts the elements of its batch.
The runtime turns a plan and its bounds into addresses once; nothing is allocated while it runs.
"""

import re
from functools import cached_property
from typing import Any, Literal

import msgspec

from tritium.errors import EngineError

PLAN_VERSION = 1
PlanKind = Literal["decoder", "encoder", "module"]
Phase = Literal["tokens", "rows"]  # steps over all T tokens, then steps over the R sampled rows


class Sizes(msgspec.Struct, frozen=True):
    """A batch's sizes: tokens, sequences, sampled rows."""

    tokens: int
    sequences: int
    rows: int


class Extent(msgspec.Struct, frozen=True):
    """One dimension: tokens·T + sequences·S + rows·R + constant. Written `T`, `2*T+1`, `64`."""

    tokens: int = 0
    sequences: int = 0
    rows: int = 0
    constant: int = 0

    def at(self, sizes: Sizes) -> int:
        """The number of elements for a batch of these sizes."""
        batch = self.tokens * sizes.tokens + self.sequences * sizes.sequences + self.rows * sizes.rows
        return batch + self.constant

    @property
    def is_static(self) -> bool:
        """True when it does not depend on the batch."""
        return not (self.tokens or self.sequences or self.rows)

    def __str__(self) -> str:
        terms = [(self.tokens, "T"), (self.sequences, "S"), (self.rows, "R")]
        parts = [name if n == 1 else f"{n}*{name}" for n, name in terms if n]
        return "+".join(parts + ([str(self.constant)] if self.constant or not parts else []))

    @classmethod
    def parse(cls, text: str | int) -> "Extent":
        """The inverse of `str`. Raises `EngineError` for anything else."""
        if isinstance(text, int) and not isinstance(text, bool):
            return cls(constant=text)
        counts = {"T": 0, "S": 0, "R": 0, "": 0}
        for term in str(text).split("+"):
            match = re.fullmatch(r"(?:(\d{1,12})\*)?([TSR])|(-?\d{1,12})", term)
            if match is None:
                raise EngineError(f"{text!r} is not a size in a plan: expected e.g. 'T', '2*T+1' or 64")
            counts[match[2] or ""] += int(match[3]) if match[3] else int(match[1] or 1)
        return cls(tokens=counts["T"], sequences=counts["S"], rows=counts["R"], constant=counts[""])


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A named tensor: `shape` holds sizes as `Extent.parse` reads them; `dtype` is torch's name without `torch.`.

    A view (`kind="view"`) is `op` applied to value `base` with the literals `args`; sizes in them may be symbolic.
    """

    name: str
    kind: Literal["input", "weight", "kv", "temp", "view"]
    dtype: str
    shape: tuple[str | int, ...]
    base: str = ""
    op: str = ""
    args: tuple[Any, ...] = ()


class Ref(msgspec.Struct, frozen=True):
    """An argument of a step that is a value, by name."""

    value: str


Scalar = bool | int | float | str | None
Arg = Ref | bool | int | float | str | None | list[Ref | bool | int | float | str | None]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel launch. `args` maps the op's parameter names to a `Ref` or a literal (number, bool, string, None).

    sources: the nodes of the captured graph that it stands for. kernel: the name of a row in `kernels/table.py`.
    """

    op: str
    args: dict[str, Arg]
    outputs: tuple[str, ...]
    phase: Phase = "tokens"
    kernel: str = ""
    tactic: dict[str, Scalar] = {}
    sources: tuple[str, ...] = ()


class KVGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that share block tables: equal window, kv heads, head size and kv type. Every group has as many layers.

    layers: indices of attention layers, in order. window: keys a query sees at most; 0: all. head_size: elements of a
    head's row in the cache; with dtype "int8" the head's own and SCALE_BYTES of ops/attention.py.
    """

    layers: tuple[int, ...]
    window: int
    num_kv_heads: int
    head_size: int
    dtype: str


class Plan(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Everything the executor needs beside the weights.

    A decoder's `output` names the logits, [R, V]. The others have named `outputs`: the model's name -> the value.
    """

    version: int = PLAN_VERSION
    kind: PlanKind = "decoder"
    values: tuple[Value, ...]
    steps: tuple[Step, ...]
    kv_groups: tuple[KVGroup, ...] = ()
    output: str = ""
    outputs: dict[str, str] = {}
    vocab_size: int = 0

    @property
    def results(self) -> tuple[str, ...]:
        """The values that are read when all steps have run."""
        return (self.output,) if self.kind == "decoder" else tuple(self.outputs.values())

    @cached_property
    def by_name(self) -> dict[str, Value]:
        """Every value by its name."""
        return {value.name: value for value in self.values}

    def value(self, name: str) -> Value:
        """The value of that name; `EngineError` when there is none."""
        if name not in self.by_name:
            raise damaged(f"the plan has no value named {name!r}")
        return self.by_name[name]


def kv_layer(name: str) -> int:
    """The attention layer whose cache the kv value `name` is; `EngineError` for a name that says none."""
    if (match := re.fullmatch(r"kv\.([0-9]{1,6})", name)) is None:
        raise damaged(f"the plan's kv value {name!r} does not say its layer, as 'kv.0' does")
    return int(match[1])


def damaged(problem: str) -> EngineError:
    """The error for a plan that no compiler has written."""
    return EngineError(f"{problem}: the engine is damaged; build it again")
