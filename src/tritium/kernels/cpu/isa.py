"""The instruction sets of x86-64 that kernels are compiled for ahead of time, and which of them this CPU has.

A wheel carries the kernels once for each level; a process takes the first that its CPU has. $TRITIUM_CPU_LEVEL names
one to be taken instead, where kernels are compiled on first use too. Nothing but the macros that stand for these flags
chooses a path (docs/cpu.md, "Layout and order"), so the best level has the bits of a library compiled for the machine.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from tritium.errors import ConfigError

NATIVE = ("-march=native",)


@dataclass(frozen=True, kw_only=True)
class Level:
    """flags: what the compiler may use. needs: what /proc/cpuinfo must list."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = ("-march=x86-64-v4", "-mavx512vnni")
_BF16 = (*_VNNI, "-mavx512bf16")
_AMX = (*_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16")

# The best first. AVX-512 without VNNI has no level: its integer sums would be plain code, which AVX2's are not.
LEVELS = (
    Level(name="amx", flags=_AMX, needs=_V4 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}),
    Level(name="avx512_bf16", flags=_BF16, needs=_V4 | {"avx512_vnni", "avx512_bf16"}),
    Level(name="avx512_vnni", flags=_VNNI, needs=_V4 | {"avx512_vnni"}),
    Level(name="avx2_vnni", flags=("-march=x86-64-v3", "-mavxvnni"), needs=_V3 | {"avx_vnni"}),
    Level(name="avx2", flags=("-march=x86-64-v3",), needs=_V3),
    Level(name="x86_64", flags=("-march=x86-64",), needs=frozenset()),
)


def best(wanted: str | None, has: frozenset[str]) -> Level:
    """The first level that a CPU with the flags `has` can run, or the one named `wanted`.

    Raises `ConfigError` when there is no such level or the CPU lacks what it needs.
    """
    possible = [level for level in LEVELS if level.needs <= has]
    if wanted is None:
        return possible[0]
    level = next((level for level in LEVELS if level.name == wanted), None)
    names = ", ".join(level.name for level in possible)
    if level is None:
        raise ConfigError(f"TRITIUM_CPU_LEVEL is {wanted!r}, which is no level of instructions; here: {names}")
    if level not in possible:
        lacks = ", ".join(sorted(level.needs - has))
        raise ConfigError(f"TRITIUM_CPU_LEVEL is {wanted!r}, but this CPU lacks {lacks}; here: {names}")
    return level


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo says that the first CPU has; nothing where it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
