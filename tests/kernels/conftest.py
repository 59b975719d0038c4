"""What the kernels' tests share."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tritium.kernels.gpu.cuda import SOURCE_DIR


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str, dict[str, Any], str], ctypes.CDLL]:
    """Compiles a GPU kernel, csrc/<name>.cu, for a CPU: its constants stand before it, C++ that calls it behind it."""

    def compile_for_cpu(name: str, constants: dict[str, Any], call: str) -> ctypes.CDLL:
        literals = {key: f"{value}f" if isinstance(value, float) else int(value) for key, value in constants.items()}
        lines = [f"#define {key} {literal}" for key, literal in literals.items()]
        texts = (Path(__file__).with_name("warp.h"), SOURCE_DIR / f"{name}.cu")
        compiler = shutil.which("g++") or shutil.which("c++")
        assert compiler, "these tests need a C++ compiler, as the CPU kernels do"
        text = "\n".join([*lines, *(path.read_text() for path in texts), call])
        source, library = (tmp_path / f"{name}-{hash(text)}{end}" for end in (".cpp", ".so"))
        if library.exists():
            return ctypes.CDLL(str(library))
        source.write_text(text)
        subprocess.run([compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", source, "-o", library], check=True)
        return ctypes.CDLL(str(library))

    return compile_for_cpu
