"""Kernels written in CUDA C++ (csrc/*.cu): compiled for the GPU that is there by torch's NVRTC, and launched.

A kernel is a source with constants set before it, so that loops unroll. No header is included: compiling takes about
a second, once a process. `launcher` packs the arguments once; a launch is one call of the driver.
"""

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tritium.errors import KernelError

logger = logging.getLogger("tritium")

SOURCE_DIR = Path(__file__).parent / "csrc"
Constant = int | float | bool
_PROGRAMMATIC_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_FLAGS = ("--std=c++17", "--use_fast_math")
_MAX_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_WITHOUT_ASKING = 48 << 10
_AMPERE = (8, 0)  # compute capability that all sources need: products of 16 by 8 by 16
_FP8_CONVERSIONS = (8, 9)  # from which cvt knows e4m3
_HOPPER = (9, 0)  # whose group-of-warps products no other capability has
_HOPPER_SOURCES = frozenset({"prefill"})


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def can_compile(device: torch.device, capability: tuple[int, int] = _AMPERE) -> bool:
    """CUDA sources can be compiled for this device, and it has at least this compute capability."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < capability:
        return False
    if _nvrtc() is None:
        logger.warning("torch's NVRTC was not found: kernels in Triton take the place of those in CUDA C++, slower")
        return False
    return True


def can_convert_fp8(device: torch.device) -> bool:
    """CUDA sources can be compiled for this device, and it converts e4m3 itself."""
    return can_compile(device, _FP8_CONVERSIONS)


@cache
def is_hopper(device: torch.device) -> bool:
    """CUDA sources can be compiled for this device, and it is of compute capability 9.0."""
    return can_compile(device) and torch.cuda.get_device_capability(device) == _HOPPER


def source_of(name: str, constants: Mapping[str, Constant]) -> str:
    """The text of csrc/<name>.cu with its constants, and what it shares with others, before it."""
    shared = ("fragments.cuh", "hopper.cuh") if name in _HOPPER_SOURCES else ("fragments.cuh",)
    texts = (SOURCE_DIR / file for file in (*shared, f"{name}.cu"))
    return "".join(f"#define {key} {_literal(value)}\n" for key, value in constants.items()) + "".join(
        path.read_text(encoding="utf-8") for path in texts
    )


def launcher(
    name: str, constants: Mapping[str, Constant], args: Sequence[Any], *, threads: int, shared_bytes: int = 0
) -> Callable[..., None]:
    """A function that launches csrc/<name>.cu's kernel of that name with so many blocks, on torch's current stream.

    args: tensors (their addresses; they must stay where they are), ints (64 bits), floats (32 bits). What the function
    gets behind the number of blocks takes the place of the last of them, which are ints. shared_bytes: of shared
    memory. From capability 9.0 on the kernel may start before the one in front of it has ended: it waits for it itself,
    by griddepcontrol.

    Raises `KernelError` with the compiler's or the driver's own words.
    """
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    function = _function(name, tuple(constants.items()), device, shared_bytes)
    values = [_argument(arg) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    attribute = _Attribute(id=_PROGRAMMATIC_LAUNCH, value=1)
    is_early = torch.cuda.get_device_capability(device) >= _HOPPER
    config = _Config(1, 1, 1, threads, 1, 1, shared_bytes, None, ctypes.pointer(attribute), int(is_early))
    launch, reference, stream_of = _driver().cuLaunchKernelEx, ctypes.byref(config), torch._C._cuda_getCurrentRawStream
    kept = (values, args)  # the driver reads them at each launch

    def run(blocks: int, *last: int) -> None:
        for value, number in zip(values[len(values) - len(last) :], last, strict=True):
            value.value = number
        config.grid_x, config.stream = blocks, stream_of(device.index)
        status = launch(reference, function, pointers, None)
        if status:
            raise KernelError(f"launching {name} with {blocks} blocks: {_driver_error(status)}")

    run.kept = kept  # type: ignore[attr-defined]
    return run


def _argument(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    return ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int64(arg)


def _literal(value: Constant) -> str:
    return f"{value}f" if isinstance(value, float) else str(int(value))


@cache
def _function(
    name: str, constants: tuple[tuple[str, Constant], ...], device: torch.device, shared_bytes: int
) -> ctypes.c_void_p:
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # there is a context
        code = _compile(name, source_of(name, dict(constants)), torch.cuda.get_device_capability(device))
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), name)
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
        if shared_bytes > _SHARED_WITHOUT_ASKING:
            _check(driver.cuFuncSetAttribute(function, _MAX_SHARED_BYTES, shared_bytes), name)
    return function


def _compile(name: str, source: str, capability: tuple[int, int]) -> bytes:
    """Machine code for one compute capability. Raises `KernelError` with the compiler's log."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    assert nvrtc is not None
    architecture = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == _HOPPER else "")
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", *_FLAGS)]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if status:
        raise KernelError(f"NVRTC cannot compile {name}.cu for {architecture}:\n{_log(program)}")
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _log(program: ctypes.c_void_p) -> str:
    nvrtc, size = _nvrtc(), ctypes.c_size_t()
    assert nvrtc is not None
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace")


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """The run-time compiler of torch's CUDA version: by name, or where pip puts NVIDIA's libraries; None: not there."""
    if torch.version.cuda is None:
        return None
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    site = Path(torch.__file__).parents[1]
    for path in (name, *map(str, sorted(site.glob(f"nvidia/*/lib/{name}"))), *map(str, site.glob(f"torch/lib/{name}"))):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _driver_error(status: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    return f"CUDA error {status}: {(text.value or b'unknown').decode()}"


def _check(status: int, name: str) -> None:
    if status:
        raise KernelError(f"loading {name}: {_driver_error(status)}")
