"""Measured times, kept over processes: by environment, then by what was measured.

One JSON file, read whole and written whole: a save takes a lock, reads what others have saved meanwhile, adds its own
and renames a new file into place. Two processes that tune at once lose nothing, and a reader never sees half a file.
"""

import fcntl
import math
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tritium.config import cache_dir
from tritium.errors import ConfigError

FORMAT, VERSION = "tritium-timings", 1


class Environment(msgspec.Struct, frozen=True):
    """Times of one machine with one set of versions: seconds by key; None: it cannot run that (JSON has no inf)."""

    environment: dict[str, str]
    seconds: dict[str, float | None] = {}


class _File(msgspec.Struct, frozen=True, kw_only=True):
    format: str = FORMAT
    version: int = VERSION
    environments: list[Environment] = []
    denied: list[str] = []


class TimingCache:
    """Times for one environment, and all others in the file, which are kept and never used."""

    def __init__(
        self, environment: dict[str, str], path: Path | None = None, *, beside: Iterable[dict[str, str]] = ()
    ) -> None:
        """path: None takes the user's cache. beside: further environments of this machine (its GPU's), whose times are
        exported and counted with these. Raises `ConfigError` when it is no file of timings."""
        self.path = path or cache_dir() / "timings.json"
        self.environment = environment
        self._here = [environment, *beside]
        self._file = _read(self.path)
        self._new: dict[str, float | None] = {}

    def get(self, key: str) -> float | None:
        """Seconds, when this was measured here; inf: it cannot run here."""
        known = (e.seconds for e in self._file.environments if e.environment == self.environment)
        for seconds in (self._new, *known):
            if key in seconds:
                value = seconds[key]
                return math.inf if value is None else value
        return None

    def put(self, key: str, seconds: float) -> None:
        """Note a time, inf for what cannot run; `save` keeps it."""
        self._new[key] = seconds if math.isfinite(seconds) else None

    @property
    def denied(self) -> tuple[str, ...]:
        """Kernels, and tactics as `kernel:name=value`, that are never chosen on this machine."""
        return tuple(self._file.denied)

    def save(self) -> None:
        """Add what was noted to the file."""
        self._update([Environment(self.environment, self._new)], [])
        self._new = {}

    def deny(self, names: Iterable[str]) -> None:
        """Never choose these again."""
        self._update([], list(names))

    def export(self, path: Path) -> int:
        """Write this machine's times to a file of their own; returns how many."""
        mine = [e for e in self._file.environments if e.environment in self._here]
        path.write_bytes(_encode(_File(environments=mine)))
        return sum(len(e.seconds) for e in mine)

    def merge(self, path: Path) -> tuple[int, int]:
        """Take the times of another file; returns how many of them are for this machine, and for others."""
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file of timings; `tritium tune --export FILE` writes one")
        other = _read(path)
        self._update(list(other.environments), other.denied)
        here = sum(len(e.seconds) for e in other.environments if e.environment in self._here)
        return here, sum(len(e.seconds) for e in other.environments) - here

    def _update(self, added: list[Environment], denied: list[str]) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            now = _read(self.path)
            environments = list(now.environments)
            for one in added:
                old = next((e for e in environments if e.environment == one.environment), None)
                if old is not None:
                    environments.remove(old)
                environments.append(Environment(one.environment, (old.seconds if old else {}) | one.seconds))
            self._file = _File(environments=environments, denied=sorted({*now.denied, *denied}))
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(_encode(self._file))
            partial.rename(self.path)


def _encode(file: _File) -> bytes:
    return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"


def _read(path: Path) -> _File:
    if not path.is_file():
        return _File()
    again = "remove it (times can be measured again)"
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no file of timings ({error}): {again}") from None
    if file.format != FORMAT or file.version != VERSION:
        raise ConfigError(f"{path} is a {file.format!r} of version {file.version}, not {FORMAT!r} {VERSION}: {again}")
    return file
