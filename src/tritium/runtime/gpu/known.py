"""GPUs that memory can be planned for without having one. Loads no torch."""

from typing import NamedTuple

from tritium.errors import ConfigError


class Gpu(NamedTuple):
    """memory_bytes: what the driver gives programs, to a tenth of a GiB, rounded down. capability: of computing."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


def _gib(tenths: int) -> int:
    return tenths * (1 << 30) // 10


KNOWN = {
    "h200": Gpu("H200", _gib(1397), (9, 0)),
    "h100": Gpu("H100 80 GB", _gib(791), (9, 0)),
    "a100": Gpu("A100 80 GB", _gib(791), (8, 0)),
    "l40s": Gpu("L40S", _gib(443), (8, 9)),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name. Raises `ConfigError` with the known names."""
    if name not in KNOWN:
        raise ConfigError(f"--gpu {name!r} is not known: it is one of {', '.join(KNOWN)}, or say --memory BYTES")
    return KNOWN[name]
