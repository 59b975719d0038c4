"""Calls of the kernels' tests, repeated without Python: under AddressSanitizer and UBSan, and as ARM's code under qemu.

`tritium.testing.kernel_calls` writes down what the kernels were called with in this folder's tests, one call for each
set of sizes, strides and flags, with all memory that a call may touch. `replay.cpp`, linked with csrc, repeats them,
each piece of memory an allocation of exactly its size, and compares every byte with what the kernels left in the tests,
which compared it with the ops' references.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tritium.config import available_threads
from tritium.kernels.cpu import build, isa
from tritium.kernels.table import KERNELS
from tritium.testing.kernel_calls import recorded
from tritium.testing.kernel_cases import run

pytestmark = pytest.mark.full
HERE = Path(__file__).parent
# Whose problems are recorded, without the tests that compile other levels or repeat one problem on more threads.
FILES = (
    "test_kernels.py",
    "test_row_fuzz.py",
    "test_fused.py",
    "test_moe.py",
    "test_paged_attention.py",
    "test_varlen_attention.py",
    "test_kv_int8.py",
    "test_sampling.py",
    "test_logit_edits.py",
    "test_linear_activation.py",
    "test_quantized_fuzz.py",
)
LEFT_OUT = "not threads and not distribution and not older and not largest and not eager and not without_amx"
KERNELS_CALLED = {
    *("activation", "add_layer_norm", "add_rms_norm", "gated_activation", "gather_rows", "kv_store", "kv_store_int8"),
    *("layer_norm", "linear", "linear_pack", "moe", "paged_attention", "quantized_embedding", "quantized_linear"),
    *("quantized_pack", "rms_norm", "rope", "rope_cos_sin", "rope_kv_store", "sampling", "scales_pack"),
    "varlen_attention",
}
BASE = [flag for flag in build.FLAGS if flag not in ("-O3", "-fvisibility=hidden")]
# -w: at -O1 GCC 12 warns of what its own headers leave undefined on purpose.
SANITIZED = ("-w", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
LEVELS = [level.name for level in isa.LEVELS if level.needs <= isa.cpu_flags()]
NARROW = ("avx2_vnni", "avx2", "x86_64")  # levels with one layout of packed weights; the others have the other one
# Scratch is kept. The "fake" stack, which GCC 13 has on by default, leaves 64-byte vectors unaligned.
ASAN = "detect_leaks=0:detect_stack_use_after_return=0"
ARM = "aarch64-linux-gnu-g++"


def recorded_at(level: str) -> str:
    """The level whose calls this one can repeat."""
    return next(name for name in ("avx2", *LEVELS) if (name in NARROW) == (level in NARROW) and name in LEVELS)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The calls of the tests with the kernels of a level of each layout."""
    folder = tmp_path_factory.mktemp("calls")
    for level in {recorded_at(level) for level in LEVELS}:
        plugin = ["-p", "no:cacheprovider", "-p", "tritium.testing.kernel_calls", "--record-kernel-calls"]
        chosen = [*(str(HERE / name) for name in FILES), "-m", "not full and not gpu", "-k", LEFT_OUT]
        command = [sys.executable, "-m", "pytest", "-q", *plugin, str(folder / level), *chosen]
        environment = {**os.environ, "TRITIUM_CPU_LEVEL": level, "CI": "1"}  # CI: the same draws every time
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
        assert done.returncode == 0, done.stdout[-3000:]
    return {level.name: level for level in folder.iterdir()}


def compile_one(command: list[str]) -> None:
    """Without a time limit, unlike the library's own: a sanitizer's code is long in the making beside other work."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compiled(folder: Path, compiler: str, flags: tuple[str, ...], sources: list[Path]) -> Path:
    """The driver, linked with these kernels."""
    made = [(source, folder / f"{source.stem}.o") for source in (HERE / "replay.cpp", *sources)]
    jobs = [[compiler, *BASE, *flags, "-I", str(build.SOURCE_DIR), "-c", str(s), "-o", str(o)] for s, o in made]
    with ThreadPoolExecutor(available_threads()) as pool:
        list(pool.map(compile_one, jobs))
    objects = [str(path) for _, path in made]
    compile_one([compiler, *BASE, *flags, "-rdynamic", "-o", str(folder / "replay"), *objects, "-ldl"])
    return folder / "replay"


def replay(program: Path, *arguments: str | Path, runner: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "ASAN_OPTIONS": ASAN}
    command = [*runner, str(program), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def check_all(done: subprocess.CompletedProcess[str]) -> None:
    """It ended well, having called every kernel."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    names, last = done.stdout.splitlines()[-2:]
    assert {re.sub("^tritium_|_(f32|bf16|f16)$", "", name) for name in names.split()} >= KERNELS_CALLED
    assert int(last.split()[0]) > 1000


@pytest.mark.parametrize("level", LEVELS)
def test_no_call_reads_or_writes_beyond_its_memory_or_does_what_is_undefined(
    level: str, calls: dict[str, Path], tmp_path: Path
) -> None:
    flags = next(each.flags for each in isa.LEVELS if each.name == level)
    program = compiled(tmp_path, "g++", (*flags, *SANITIZED), sorted(build.SOURCE_DIR.glob("*.cpp")))
    source = recorded_at(level)
    check_all(replay(program, calls[source], *([] if source == level else ["--uncompared"])))


@pytest.mark.skipif("avx2" not in LEVELS, reason="the calls are those of AVX2's kernels")
def test_arms_code_leaves_the_very_bytes_of_avx2s(calls: dict[str, Path], tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    assert shutil.which(ARM) and emulator, "apt-get install g++-aarch64-linux-gnu qemu-user"
    program = compiled(tmp_path, ARM, ("-O3",), sorted(build.SOURCE_DIR.glob("*.cpp")))
    done = replay(program, calls["avx2"], runner=(emulator, "-L", "/usr/aarch64-linux-gnu"))
    check_all(done)
    assert done.stdout.endswith("calls, 0 differ\n")


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("load(x + i, count)", ""),
        ("load(x + i + 1, count)", "AddressSanitizer: heap-buffer-overflow"),
        ("load(x + i, count + (a.size << 62))", "runtime error: left shift"),
        ("-load(x + i, count)", "differs from byte 0 on"),
    ],
)
def test_a_kernel_with_a_planted_mistake_is_found_out(planted: str, complaint: str, tmp_path: Path) -> None:
    kernel = next(k for k in KERNELS if k.name == "cpu.activation")
    with open(tmp_path / "calls", "wb") as file, recorded(file):
        run(kernel, {"x": torch.randn(3, 21), "kind": "relu"}, (3, 21), torch.float32)
    right = (build.SOURCE_DIR / "activations.cpp").read_text()
    assert right.count("load(x + i, count)") == 1
    (tmp_path / "activations.cpp").write_text(right.replace("load(x + i, count)", planted))
    done = replay(compiled(tmp_path, "g++", SANITIZED, [tmp_path / "activations.cpp"]), tmp_path / "calls")
    assert (done.returncode == 0) == (not complaint) and complaint in done.stdout + done.stderr
