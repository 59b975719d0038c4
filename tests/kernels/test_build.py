"""The kernel library's cache: private, written in one step, shared by processes that build at once."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tritium.errors import KernelError
from tritium.kernels.cpu import build

SOURCE = 'extern "C" int answer() { return 42; }\n'
RUNTIME = "-lm"  # stands for the OpenMP runtime at link time


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "csrc"
    directory.mkdir()
    (directory / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCE_DIR", directory)
    return directory


def _build(cache: Path, compiler: str = "g++") -> tuple[Path, list[str]]:
    lines: list[str] = []
    return build.library_path(compiler, RUNTIME, cache, progress=lines.append), lines


def test_the_first_call_compiles_and_says_so_and_the_second_does_neither(sources: Path, tmp_path: Path) -> None:
    path, lines = _build(tmp_path / "cache")
    assert path.name == build.NAME and "compiling CPU kernels with g++" in lines[0] and len(lines) == 2
    written = path.stat().st_mtime_ns
    again, lines = _build(tmp_path / "cache")
    assert again == path and lines == [] and path.stat().st_mtime_ns == written


def test_a_cached_library_needs_neither_a_process_nor_the_compiler(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = _build(tmp_path / "cache")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert _build(tmp_path / "cache") == (path, [])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _build(tmp_path / "cache") == (path, [])


def test_another_compiler_of_the_same_name_builds_anew(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    compiler = programs / "mine"
    compiler.write_text('#!/bin/sh\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{build.os.environ['PATH']}")
    first, _ = _build(tmp_path / "cache", "mine")
    assert _build(tmp_path / "cache", "mine") == (first, [])
    compiler.write_text('#!/bin/sh\nexec g++ -O1 "$@"\n')
    second, lines = _build(tmp_path / "cache", "mine")
    assert second != first and len(lines) == 2
    compiler.unlink()
    assert _build(tmp_path / "cache", "mine") == (second, [])


def test_another_source_or_runtime_gets_another_directory(sources: Path, tmp_path: Path) -> None:
    first, _ = _build(tmp_path / "cache")
    other = build.library_path("g++", "-ldl", tmp_path / "cache", progress=lambda _: None)
    (sources / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    assert len({first, other, _build(tmp_path / "cache")[0]}) == 3


def test_the_cache_is_for_its_owner_alone_even_under_a_loose_umask(sources: Path, tmp_path: Path) -> None:
    script = f"import os; os.umask(0o002); {_script(sources, tmp_path / 'cache')}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    path = Path(done.stdout.split()[0])
    for part in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(part.stat().st_mode) == 0o700, part


def test_a_cache_that_others_may_write_or_own_or_that_is_a_link_is_refused(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path, _ = _build(cache)
    for part in (cache, path.parent, path):
        part.chmod(0o777)
        with pytest.raises(KernelError, match=r"may be written by others \(mode 777\)"):
            _build(cache)
        part.chmod(0o700)
    (tmp_path / "link").symlink_to(cache)
    with pytest.raises(KernelError, match="symbolic link"):
        _build(tmp_path / "link")
    monkeypatch.setattr(build.os, "geteuid", lambda: 12345)
    with pytest.raises(KernelError, match="belongs to user"):
        _build(cache)


def test_an_error_carries_the_compilers_words_and_leaves_nothing_behind(sources: Path, tmp_path: Path) -> None:
    (sources / "broken.cpp").write_text("int f() { return undeclared_name; }\n")
    with pytest.raises(KernelError, match=r"(?s)failed with code 1.*undeclared_name"):
        _build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_compiler_is_named(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="no C\\+\\+ compiler: `no-such-compiler` cannot be run"):
        _build(tmp_path / "cache", "no-such-compiler -O1")


def test_processes_that_build_at_once_end_with_one_library(sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _script(sources, tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0] and len({path for path, _ in lines}) == 1
    assert sorted(num_lines for _, num_lines in lines) == ["0", "0", "2"]  # one has compiled, the others have waited
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [Path(lines[0][0]).parent.name]


def test_without_locks_processes_that_build_at_once_end_with_one_library_too(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    def beaten(command: list[str]) -> str:
        done = run(command)
        if "-shared" in command:  # another one was faster
            monkeypatch.setattr(build, "_run", run)
            _build(tmp_path / "cache")
        return done

    run = build._run
    monkeypatch.setattr(build.fcntl, "flock", no_locks)
    monkeypatch.setattr(build, "_run", beaten)
    path, _ = _build(tmp_path / "cache")
    assert path.exists() and [p.name for p in (tmp_path / "cache").iterdir()] == [path.parent.name]


def _script(sources: Path, cache: Path) -> str:
    """Builds in a process of its own; prints the path and the lines of progress. Needs no torch: it starts at once."""
    return (
        "from pathlib import Path; from tritium.kernels.cpu import build; lines = []; "
        f"build.SOURCE_DIR = Path({str(sources)!r}); "
        f"print(build.library_path('g++', {RUNTIME!r}, Path({str(cache)!r}), progress=lines.append), len(lines))"
    )
