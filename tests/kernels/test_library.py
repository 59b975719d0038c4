"""The compiled library in a process: one OpenMP runtime, and every reason for not using it said aloud."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

from tritium.errors import KernelError
from tritium.kernels.cpu import library, openmp

_PROBE = """
import json, torch
from tritium.kernels import select
from tritium.kernels.cpu import library, openmp
from tritium.kernels.kernel import TensorSpec, resolve
spec = lambda t: TensorSpec(dtype=t.dtype, shape=tuple(t.shape))
x, weight, out = torch.ones(64, 1024), torch.ones(1024), torch.empty(64, 1024)
args = {"x": x, "weight": weight, "eps": 0.0}
kernel = select.choose("rms_norm", {**args, "x": spec(x), "weight": spec(weight)}, available={"cpu", "eager"})
resolve(kernel.target)(args, [out])()
print(json.dumps([kernel.name, library.why_not(), len(openmp.loaded_runtimes()), out.eq(1).all().item()]))
"""


def _probe(**environment: str) -> list:
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_library_shares_torchs_one_openmp_runtime() -> None:
    assert _probe() == ["cpu.rms_norm", "", 1, True]


def test_without_a_compiler_the_reason_is_given_and_the_eager_kernel_runs() -> None:
    assert _probe(CXX="") == ["eager.rms_norm", "no C++ compiler: CXX is empty", 1, True]


def test_torchs_runtime_is_told_from_another_by_its_directory() -> None:
    (own,) = openmp.loaded_runtimes()
    assert openmp.torch_runtime(frozenset({own, "/usr/lib/libgomp.so.1"})) == own
    with pytest.raises(KernelError, match=r"which OpenMP runtime torch uses; loaded: /a/libgomp.so.1, /b/libiomp5.so"):
        openmp.torch_runtime(frozenset({"/a/libgomp.so.1", "/b/libiomp5.so"}))
    with pytest.raises(KernelError, match="loaded: none"):
        openmp.torch_runtime(frozenset())


class _TooSmall(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p)]


def test_a_struct_of_another_size_than_the_library_expects_is_refused() -> None:
    with pytest.raises(KernelError, match="_TooSmall has 8 bytes, csrc has"):
        library.thunk("rms_norm", torch.float32, _TooSmall())


def test_a_thunk_keeps_its_tensors_alive() -> None:
    x = torch.zeros(4)
    call = library.thunk("gather_rows", None, _gather_args(), x)
    before = sys.getrefcount(x)
    del call
    assert sys.getrefcount(x) == before - 1


def _gather_args() -> ctypes.Structure:
    from tritium.kernels.cpu.copies import GatherRowsArgs

    return GatherRowsArgs()
