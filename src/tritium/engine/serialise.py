"""Write an engine directory: into a temporary directory beside it, then one rename. A failure leaves nothing behind."""

import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from tritium.engine.manifest import MANIFEST_NAME, PLAN_NAME, FileRecord, Manifest, encode, is_engine, record
from tritium.engine.plan import Plan
from tritium.errors import EngineError
from tritium.text.tokenizer_files import TOKENIZER_FILES

WEIGHTS_NAME = "weights.safetensors"
OF_THE_WEIGHTS = (WEIGHTS_NAME, "certificate.json")  # say something of the weights; other ones make them wrong
LOCK_NAME = "building.lock"  # in a partial directory; its builder held an flock on it before it had this name
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
WriteWeights = Callable[[Path], FileRecord]  # writes the safetensors file at a path, and says what it wrote
UNLOCKED_AGE_S = 24 * 3600  # a younger partial directory without a lock may be about to get one, or to be renamed


def write_engine(
    output_dir: str | Path,
    *,
    manifest: Manifest,
    plan: Plan,
    texts: Mapping[str, str],
    write_weights: WriteWeights | None,
    model_dir: Path | None = None,
) -> Path:
    """Write an engine and return its path.

    manifest: without `files`; they are filled in here. texts: further files by name (graph.txt, recipes.json, ...).
    write_weights: None for an engine that has no weights file.
    model_dir: the checkpoint whose tokenizer and configuration files are copied.

    An engine that is already there is replaced; anything else that is there is an `EngineError`. Whatever is raised on
    the way (a full disk, an interrupt) leaves the old state and no temporary directory; a killed process leaves only a
    directory named `.<name>.partial-*`, which the next build into the same place removes.
    """
    output_dir = _prepared(output_dir)
    with _partial_directory(output_dir) as partial:
        (partial / PLAN_NAME).write_bytes(msgspec.json.encode(plan))
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in [] if model_dir is None else [model_dir / name for name in TOKENIZER_FILES]:
            if path.is_file():
                shutil.copyfile(path, partial / path.name)
        files = {path.name: record(path) for path in partial.iterdir() if path.name != LOCK_NAME}
        if write_weights is not None:
            files[WEIGHTS_NAME] = write_weights(partial / WEIGHTS_NAME)
        files = dict(sorted(files.items()))
        _finish(partial, output_dir, msgspec.structs.replace(manifest, files=files))
    return output_dir


@contextmanager
def staged(output_dir: str | Path) -> Iterator[Path]:
    """A path beside `output_dir` to write an engine at; at the end, not after an error, it goes there in one step."""
    output_dir = _prepared(output_dir)
    with _partial_directory(output_dir) as partial:
        yield partial / "engine"
        _publish(partial / "engine", output_dir)
    _sync(output_dir.parent)


def replace_weights(engine_dir: Path, manifest: Callable[[], Manifest], write_weights: WriteWeights) -> None:
    """Put other weights into an engine, in one step: whoever opens it sees the old engine or the new one, both whole.

    manifest: called when the weights are written; its `files` are those of the engine as it was. Files that spoke of
    the old weights are left out; all others are kept (as hard links, where the file system has them).
    """
    engine_dir = Path(os.path.abspath(engine_dir))
    _remove_leftovers(engine_dir)
    with _partial_directory(engine_dir) as partial:
        _keep_files(engine_dir, partial, but=(*OF_THE_WEIGHTS, MANIFEST_NAME))
        written = write_weights(partial / WEIGHTS_NAME)
        changed = manifest()
        files = {name: file for name, file in changed.files.items() if name not in OF_THE_WEIGHTS}
        files[WEIGHTS_NAME] = written
        _finish(partial, engine_dir, msgspec.structs.replace(changed, files=files))


def replace_text(engine_dir: Path, manifest: Manifest, name: str, text: str) -> None:
    """Put one small file into an engine, or replace it, in one step; all others are kept."""
    engine_dir = Path(os.path.abspath(engine_dir))
    _remove_leftovers(engine_dir)
    with _partial_directory(engine_dir) as partial:
        _keep_files(engine_dir, partial, but=(name, MANIFEST_NAME))
        (partial / name).write_text(text, encoding="utf-8")
        files = manifest.files | {name: record(partial / name)}
        _finish(partial, engine_dir, msgspec.structs.replace(manifest, files=files))


def _finish(partial: Path, output_dir: Path, manifest: Manifest) -> None:
    """Write the manifest, make everything durable, and put the directory in its place."""
    (partial / MANIFEST_NAME).write_bytes(encode(manifest))
    for path in partial.iterdir():
        _sync(path)
    partial.chmod(0o755)
    (partial / LOCK_NAME).unlink()
    _publish(partial, output_dir)
    _sync(output_dir.parent)


def _keep_files(engine_dir: Path, partial: Path, *, but: Collection[str]) -> None:
    """Link the engine's files into `partial`, or copy them where there are no links."""
    for path in engine_dir.iterdir():
        if path.is_file() and path.name not in but:
            try:
                os.link(path, partial / path.name)
            except OSError:
                shutil.copy2(path, partial / path.name)


def _prepared(output_dir: str | Path) -> Path:
    """The absolute path, below a directory that exists, of nothing or of an engine, without leftovers beside it."""
    output_dir = Path(os.path.abspath(output_dir))
    is_free = not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir()))
    if not is_free and not is_engine(output_dir):
        raise EngineError(f"{output_dir} exists and is not an engine: choose another output directory")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(output_dir)
    return output_dir


def _partial_prefix(output_dir: Path) -> str:
    return f".{output_dir.name}.partial-"


@contextmanager
def _partial_directory(output_dir: Path) -> Iterator[Path]:
    """A new directory beside `output_dir`, locked while this process lives; removed at the end if it is still there."""
    path = Path(tempfile.mkdtemp(prefix=_partial_prefix(output_dir), dir=output_dir.parent))
    try:
        with (path / f"{LOCK_NAME}.new").open("w") as lock:
            with suppress(OSError):  # a file system without locks: nobody else can lock it either, so it is left alone
                fcntl.flock(lock, fcntl.LOCK_EX)
            (path / f"{LOCK_NAME}.new").rename(path / LOCK_NAME)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers(output_dir: Path) -> None:
    """Remove what killed builds left beside the target, not what a living one, perhaps in another container, writes."""
    for path in output_dir.parent.glob(glob.escape(_partial_prefix(output_dir)) + "*"):
        try:
            with (path / LOCK_NAME).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > UNLOCKED_AGE_S:
                    shutil.rmtree(path, ignore_errors=True)
        except OSError:  # it is locked, or not ours
            continue


def _publish(partial: Path, output_dir: Path) -> None:
    """Rename `partial` to `output_dir`, in exchange with an engine in the way; that is removed with `partial`.

    Where the file system cannot exchange, the engine in the way steps aside first and is removed last: a process killed
    between the two renames then leaves it in a partial directory beside its place.
    """
    if not output_dir.exists():
        partial.rename(output_dir)
        return
    if _exchange(partial, output_dir):
        return
    with _partial_directory(output_dir) as old:
        output_dir.rename(old / "old")
        try:
            partial.rename(output_dir)
        except BaseException:  # an interrupt too: the engine goes back before `old` is removed with it
            (old / "old").rename(output_dir)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step (Linux, renameat2); False where that is not possible, and nothing is changed."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    """Make the file durable before the rename makes it visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
