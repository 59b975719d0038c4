"""Building the kernel library: compile csrc/*.cpp in parallel, link, and rename into the cache in one step.

The cache directory holds code that will run, so it is made 0700 and refused when someone else owns or may write it.
One process builds at a time and who waits for it finds its library; where the cache's file system knows no locks, each
builds in a directory of its own, the first rename wins and the other is thrown away.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tritium.config import available_threads
from tritium.errors import KernelError
from tritium.kernels.cpu import isa

SOURCE_DIR = Path(__file__).parent / "csrc"
NAME = "libtritium_kernels.so"
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")
# No value depends on how a compiler pairs products with sums; the other two only let sqrt and selects become vectors.
EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", *EXACT, *WARNINGS)
COMPILE_TIMEOUT_S = 300


def library_path(
    compiler: str,
    openmp_runtime: str,
    cache: Path,
    source_dir: Path | None = None,
    *,
    instructions: Sequence[str] = isa.NATIVE,
    progress: Callable[[str], None],
) -> Path:
    """The library for this machine, compiler and OpenMP runtime; built when the cache does not have it.

    source_dir: its *.cpp are compiled, with the headers of SOURCE_DIR; None: Tritium's own.
    instructions: the compiler's flags for the instructions it may use.
    compiler: a command, possibly with arguments ("ccache g++"). progress gets one line when something is built.
    Raises `KernelError` with the compiler's own words, or with why the cache cannot be trusted.
    """
    command, source_dir, flags = shlex.split(compiler), source_dir or SOURCE_DIR, (*FLAGS, *instructions)
    directory = _directory(cache, command, (*flags, *command, _cpu(), openmp_runtime), source_dir)
    make_private(cache)
    if not directory.exists():
        with _alone(cache):
            if not directory.exists():
                progress(f"tritium: compiling CPU kernels with {compiler} (once, into {directory})")
                start = time.perf_counter()
                _build_into(directory, command, flags, openmp_runtime, source_dir)
                progress(f"tritium: CPU kernels compiled in {time.perf_counter() - start:.1f} s")
    _check_private(directory)
    library = directory / NAME
    _check_private(library)
    return library


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Hold the lock of the cache's directory: two builds at once would only share the cores."""
    directory = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # no locks here: see above
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)  # which unlocks it, as the end of a process does


def _directory(cache: Path, command: Sequence[str], options: Sequence[str], source_dir: Path) -> Path:
    """Where the library of these sources, options and this compiler is or will be. Starts no process.

    Without the compiler, the newest library that the same command has built here: it may be gone from a small image.
    """
    key, compiler = _key(options, source_dir), _compiler(command)
    built = [path for path in cache.glob(f"{key}-*") if path.is_dir()] if compiler is None else []
    if built:
        return max(built, key=lambda path: path.lstat().st_mtime_ns)
    return cache / f"{key}-{hashlib.sha256((compiler or '').encode()).hexdigest()[:8]}"


def _key(options: Sequence[str], source_dir: Path) -> str:
    """A hash of what the bits depend on beside the compiler: sources, and flags, command, CPU, OpenMP runtime."""
    digest = hashlib.sha256()
    headers = [path for path in SOURCE_DIR.iterdir() if path.suffix == ".h" and source_dir != SOURCE_DIR]
    for path in sorted([*source_dir.iterdir(), *headers]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for text in options:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:24]


def _compiler(command: Sequence[str]) -> str | None:
    """What tells one compiler from another: path, time and size of each program in the command; None: not installed."""
    programs = [found for word in command if (found := shutil.which(word))]
    if shutil.which(command[0]) is None:
        return None
    files = [(os.path.realpath(path), os.stat(path)) for path in programs]
    return "\n".join(f"{path} {status.st_mtime_ns} {status.st_size}" for path, status in files)


def _cpu() -> str:
    """What -march=native depends on: the CPU's model and instruction sets."""
    wanted = ("model name", "cpu family", "model\t", "stepping", "flags", "Features")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _build_into(
    directory: Path, command: Sequence[str], flags: Sequence[str], openmp_runtime: str, source_dir: Path
) -> None:
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=directory.parent))  # mkdtemp makes it 0700
    try:
        compile_library(work / NAME, command, flags, [openmp_runtime], source_dir)
        (work / NAME).chmod(0o700)  # whatever the umask
        try:
            work.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already when the rename won


def compile_library(
    output: Path, command: Sequence[str], flags: Sequence[str], link: Sequence[str], source_dir: Path
) -> None:
    """`output`, a shared object of the directory's *.cpp, compiled side by side; `link` is what it is linked with."""
    sources = sorted(source_dir.glob("*.cpp"))
    with tempfile.TemporaryDirectory(prefix=".objects-", dir=output.parent) as objects_dir:
        objects = [Path(objects_dir) / f"{source.stem}.o" for source in sources]
        jobs = [
            [*command, *flags, "-I", str(SOURCE_DIR), "-c", str(s), "-o", str(o)]
            for s, o in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(available_threads()) as pool:
            list(pool.map(_run, jobs))
        _run([*command, "-shared", "-o", str(output), *map(str, objects), *link])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"no C++ compiler: `{command[0]}` cannot be run: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[:8])
        raise KernelError(f"`{shlex.join(command)}` failed with code {done.returncode}:\n{tail}")
    return done.stdout


def make_private(directory: Path) -> None:
    """Make a directory that only this user may write; refuse one that another owns or may write."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    _check_private(directory)


def _check_private(path: Path) -> None:
    """Refuse what another user owns or may write: it will be run."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise KernelError(f"{path} is a symbolic link: compiled code is loaded only from a directory of its own")
    if status.st_uid != os.geteuid():
        raise KernelError(
            f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}: remove it, or set TRITIUM_CACHE"
        )
    if status.st_mode & 0o022:
        raise KernelError(f"{path} may be written by others (mode {stat.S_IMODE(status.st_mode):o}): chmod go-w it")
