"""`tactics.json`: for each site of a plan the kernel, and for each size of batch the tactic, that were fastest.

A site is every step with the same op, literals, dtypes and sizes: the same layer after layer. A site has one kernel,
so its numbers are of one class and its weights are packed in one layout; only tactics, which keep the bits, vary with
the batch. Times are of one machine: elsewhere the file is not used.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import msgspec

from tritium.engine.manifest import TACTICS_NAME
from tritium.errors import EngineError
from tritium.kernels.kernel import Tactic

TACTICS_VERSION = 1


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One site: the indices of its steps, its kernel, and the tactic for batches of up to so many tokens (or rows).

    seconds: by batch size, what a step took with that tactic; for people.
    """

    site: str
    steps: tuple[int, ...]
    kernel: str
    tactics: tuple[tuple[int, Tactic], ...] = ()
    seconds: dict[str, float] = {}


class Tactics(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """environment: where it was measured. effort: how thoroughly. choices: of the sites that have a choice.

    num_measured, num_cached: times taken for it, and times that the cache had.
    """

    version: int = TACTICS_VERSION
    environment: dict[str, str]
    effort: str
    choices: tuple[Choice, ...] = ()
    num_measured: int = 0
    num_cached: int = 0

    @cached_property
    def kernels(self) -> Mapping[int, str]:
        """The kernel by step index."""
        return {step: choice.kernel for choice in self.choices for step in choice.steps}

    @cached_property
    def _by_step(self) -> Mapping[int, Choice]:
        return {step: choice for choice in self.choices for step in choice.steps}

    def tactic(self, step: int, kernel: str, count: int) -> Tactic:
        """For a step run by `kernel` over `count` tokens or rows; empty: the kernel's default."""
        choice = self._by_step.get(step)
        if choice is None or choice.kernel != kernel or not choice.tactics:
            return {}
        return next((tactic for limit, tactic in choice.tactics if count <= limit), choice.tactics[-1][1])


def read_tactics(directory: Path) -> Tactics:
    """The file's content. `EngineError` when it is damaged or of another version."""
    path = directory / TACTICS_NAME
    try:
        tactics = msgspec.json.decode(path.read_bytes(), type=Tactics)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} is damaged ({error}): run `tritium tune {directory}` again") from None
    if tactics.version != TACTICS_VERSION:
        raise EngineError(
            f"{path} has version {tactics.version}, this Tritium reads {TACTICS_VERSION}: tune the engine again"
        )
    return tactics
