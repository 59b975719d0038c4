"""What measured times depend on beside the engine: the machine, or the GPU, and the versions of what runs on it."""

import ctypes
import functools
import hashlib
from importlib import metadata
from pathlib import Path

import torch

import tritium
from tritium.config import RuntimeConfig, available_threads, cpu_level

_KERNELS = Path(__file__).parents[1] / "kernels"
_SOURCES = (".py", ".cpp", ".h")
_GPU_SOURCES = (".py", ".cu", ".cuh")
_BLOCK_SIZE = "block_size"
_MATTERS = ("model name", "cpu family", "model\t", "stepping", "flags", "Features")


def environment(num_threads: int | None = None) -> dict[str, str]:
    """hardware, threads, versions and kernels of this process; times are worth something only where all are equal."""
    return {
        "hardware": _hardware() + (f" as {level}" if (level := cpu_level()) else ""),
        "threads": str(num_threads or available_threads()),
        "tritium": tritium.__version__,
        "torch": str(torch.__version__),
        "kernels": _kernels(_KERNELS, _SOURCES),
    }


def gpu_environment() -> dict[str, str]:
    """The same of the current CUDA device, which must be there: its name and capability, its driver, the versions."""
    major, minor = torch.cuda.get_device_capability()
    flashinfer = _version("flashinfer-python")
    return {
        "hardware": f"{torch.cuda.get_device_name()} of compute capability {major}.{minor}",
        "driver": _driver(),
        "tritium": tritium.__version__,
        "torch": str(torch.__version__),
        "triton": _version("triton") or "unknown",
        "kernels": _kernels(_KERNELS / "gpu", _GPU_SOURCES),
        **({"flashinfer": flashinfer} if flashinfer else {}),
    }


def differences(measured: dict[str, str], here: dict[str, str]) -> str:
    """What is not the same, for people; empty when all is."""
    names = [name for name in here if measured.get(name) != here[name]]
    return ", ".join(f"{name} was {measured.get(name, 'unknown')!r}, is {here[name]!r}" for name in names)


def over_blocks(environment: dict[str, str], block_size: int) -> dict[str, str]:
    """An environment in which attention is timed over KV blocks of so many tokens. Of the default size nothing is said,
    and `differences` does not look at it: of what a GPU runs, attention alone depends on it."""
    return environment | ({} if block_size == RuntimeConfig.block_size else {_BLOCK_SIZE: str(block_size)})


def block_size_of(environment: dict[str, str]) -> str:
    """Tokens in the KV blocks over which attention was timed in it."""
    return environment.get(_BLOCK_SIZE, str(RuntimeConfig.block_size))


def _version(package: str) -> str | None:
    """Of an installed package; None: there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _hardware() -> str:
    """The CPU's name, and a hash of its model and instruction sets."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return "unknown"
    lines = [line for line in first.splitlines() if line.startswith(_MATTERS)]
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:8]}"


def _driver() -> str:
    """The driver's version where the system says it, else the CUDA version that it knows."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


@functools.cache
def _kernels(directory: Path, suffixes: tuple[str, ...]) -> str:
    """A hash of the kernels' source: other code takes another time."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.suffix in suffixes:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
