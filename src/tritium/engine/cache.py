"""The user's cache of engines: built once per content of the model, BuildConfig and Tritium, found again by their hash.

<cache_dir>/engines/<model name>-<key>/    an engine
<cache_dir>/engines/hashes.json            sha256 of model files by (path, size, mtime, inode): a second start does
                                           not read the weights to find their engine
"""

import dataclasses
import fcntl
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from tritium import __version__
from tritium.config import BuildConfig, cache_dir
from tritium.engine.manifest import MANIFEST_VERSION, is_engine, record
from tritium.engine.plan import PLAN_VERSION
from tritium.errors import CheckpointError, EngineError

KEY_LENGTH = 16
MODEL_FILE_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt")
MAX_SIDE_FILE = 64 << 20  # bytes; other files (a text corpus, say) do not belong to a model
COMPILER_PARTS = (
    "ops",
    "graph",
    "passes",
    "models",
    "weights",
    "quant",
    "engine/plan.py",
    "compiled.py",
    "compiler.py",
    "resolve.py",
)


class CachedEngine(NamedTuple):
    """One entry of the cache: where, how large in bytes, when last used (seconds since the epoch)."""

    path: Path
    num_bytes: int
    last_used: float


def engines_dir() -> Path:
    """The directory of cached engines, made 0700. `EngineError`: it cannot be made, or others own or may write it."""
    path = cache_dir() / "engines"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{path} cannot be made ({error}): set TRITIUM_CACHE to a directory of yours") from error
    info = path.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(f"{path} must belong to you and be writable by nobody else: fix it, or set TRITIUM_CACHE")
    return path


def engine_path(model_dir: Path, build: BuildConfig, plugins: Sequence[str] = ()) -> Path:
    """Where the engine of this model, built like this by this Tritium, belongs; it may not be there yet."""
    digest = hashlib.sha256()
    versions = (__version__, str(MANIFEST_VERSION), str(PLAN_VERSION), _compiler_fingerprint())
    for text in (*versions, repr(sorted(dataclasses.asdict(build).items())), *plugins):
        digest.update(text.encode() + b"\0")
    for name, sha256 in file_hashes(model_dir):
        digest.update(f"{name} {sha256}\0".encode())
    name = model_dir.resolve().name
    if name == "checkpoint":
        name = f"{model_dir.resolve().parent.name}-{name}"
    return engines_dir() / f"{name}-{digest.hexdigest()[:KEY_LENGTH]}"


def cached_engines() -> list[CachedEngine]:
    """Every engine in the cache, the most recently used first."""
    found = []
    for path in engines_dir().iterdir():
        if is_engine(path):
            num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(CachedEngine(path, num_bytes, path.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.last_used)


def remove(path: Path) -> None:
    """Remove one engine of the cache. Raises `EngineError` for a path that is not one."""
    if path.parent.resolve() != engines_dir().resolve() or not is_engine(path):
        raise EngineError(f"{path} is not an engine in {engines_dir()}")
    shutil.rmtree(path)


def touch(path: Path) -> None:
    """Note that an engine was used now."""
    os.utime(path)


@contextmanager
def build_lock(path: Path) -> Iterator[None]:
    """Hold while building the engine `path`: a second process waits, then finds it built."""
    with (engines_dir() / f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_hashes(model: Path) -> list[tuple[str, str]]:
    """(name, sha256) of each file that belongs to the model (a directory or a .gguf file), by name.

    A file whose path, size, time and inode are known is not read again. Raises `CheckpointError` when there is none.
    """
    memo_path = engines_dir() / "hashes.json"
    memo = _read_memo(memo_path)
    hashes = []
    is_new = False
    for path in sorted(_model_files(model)):
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            continue
        if path != model and path.suffix != ".safetensors" and info.st_size > MAX_SIDE_FILE:
            continue
        identity = f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}|{info.st_ino}"
        if identity not in memo:
            memo[identity] = record(path).sha256
            is_new = True
        hashes.append((str(path.relative_to(model if model.is_dir() else model.parent)), memo[identity]))
    if not hashes:
        raise CheckpointError(f"{model} holds no model: expected config.json and *.safetensors")
    if is_new:
        partial = memo_path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")  # a name no one else writes
        partial.write_bytes(msgspec.json.encode(memo))
        partial.rename(memo_path)
    return hashes


def _model_files(model: Path) -> list[Path]:
    """What may belong to a model directory, or to a .gguf file: its tokenizer and configuration lie beside it."""
    if model.is_dir():
        parts = model.glob("[0-9]_*/config.json")  # of sentence-transformers
        return [path for path in (*model.iterdir(), *parts) if path.suffix in MODEL_FILE_SUFFIXES]
    beside = (path for path in model.parent.iterdir() if path.suffix in MODEL_FILE_SUFFIXES)
    return [model, *(path for path in beside if path.suffix != ".safetensors")]


def _read_memo(path: Path) -> dict[str, str]:
    """The memo, or an empty one: it is only a memo."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}


def _compiler_fingerprint() -> str:
    """A hash of the compiler's own source: what other code made is another engine, whatever the version says."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for part in COMPILER_PARTS:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
