"""Is there a GPU to run on? Loads neither Triton nor anything that needs it, so that the answer can be no."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from tritium.engine.engine import Engine
from tritium.errors import EngineError, OutOfMemory
from tritium.kernels.kernel import Kernel
from tritium.runtime.memory import LESS_OF_A_DECODER, gpu_out_of_memory


def check_device(device: str, num_gpus: int = 1) -> None:
    """Raise `EngineError` for "cuda" where there are fewer GPUs: asked before an engine is built to be run here."""
    if device == "cuda":
        _find_gpu(f"device={device!r} was asked for", "leave it out to run on the CPU")
        if (found := torch.cuda.device_count()) < num_gpus:
            raise EngineError(
                f"tensor_parallel={num_gpus} with device={device!r} needs as many GPUs, and torch finds {found} here: "
                f"say at most {found}"
            )


def check_tuning(device: str, effort: str) -> None:
    """Raise `EngineError` where an engine for `device` cannot be tuned: to be asked before it is built to be."""
    if device == "cuda" and effort != "none":
        _find_gpu(
            f"tune={effort!r} with device={device!r} times kernels on the GPU that will run them",
            f"build without tune, then run `tritium tune ENGINE --effort {effort}` where that GPU is",
        )


def gpu_for(engine: Engine) -> torch.device:
    """The current CUDA device. Raises `EngineError` when there is none."""
    source = engine.manifest.model.get("source", "MODEL")
    return _find_gpu(
        f"{engine.path} was built for an NVIDIA GPU",
        f"build it for the CPU: tritium build {source} --device cpu",
    )


def capability_for(engine: Engine) -> tuple[int, int]:
    """Of the current CUDA device. Raises `EngineError` when there is none."""
    return torch.cuda.get_device_capability(gpu_for(engine))


def check_kernels(kernels: Sequence[Kernel]) -> None:
    """Raise `EngineError` when the current CUDA device is too old for a step's kernel."""
    check_capability(kernels, torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def check_capability(kernels: Sequence[Kernel], name: str, capability: tuple[int, int]) -> None:
    """Raise `EngineError` when a step's kernel needs a newer GPU than the one of that name."""
    needed = max(kernels, key=lambda kernel: kernel.min_capability)
    if needed.min_capability > capability:
        found, wanted = (".".join(map(str, pair)) for pair in (capability, needed.min_capability))
        raise EngineError(
            f"{needed.name} needs compute capability {wanted}, and {name} has {found}: build the model with "
            "--scheme w8a8, w8a16 or w4a16_g128, or with none"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of the GPU's memory: what is free, and what torch holds unused."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def out_of_memory(device: torch.device, doing: str, parts: str, less: str = LESS_OF_A_DECODER) -> OutOfMemory:
    """What is said when an allocation on the GPU fails; see `gpu_out_of_memory`."""
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return gpu_out_of_memory(doing, torch.cuda.get_device_name(device), free_bytes, total_bytes, parts, less)


def _find_gpu(why: str, instead: str) -> torch.device:
    if not torch.cuda.is_available():
        raise EngineError(f"{why}, and torch {torch.__version__} finds no GPU here; {instead}")
    if find_spec("triton") is None:
        raise EngineError(
            f"{why}, and Triton, in which kernels for it are written, is not installed: pip install triton"
        )
    return torch.device("cuda", torch.cuda.current_device())
