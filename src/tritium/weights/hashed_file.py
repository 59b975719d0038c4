"""A new file whose sha256 is made while it is written, on a second thread: nothing is read a second time."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

PIECE = 8 << 20  # bytes that are written while they are hashed


class HashedFile:
    """A context manager. Raises `OSError` as `open(path, "xb")` and `write` do."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        self._file: BufferedWriter = self._path.open("xb")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="tritium-sha256")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hasher.shutdown()
        self._file.close()

    def write(self, data: memoryview) -> None:
        """Append `data`, bytes that do not change meanwhile; at the end nobody refers to it any more."""
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            hashed = self._hasher.submit(self._digest.update, piece)
            self._file.write(piece)
            hashed.result()

    @property
    def sha256(self) -> str:
        """In hex, of all that was written."""
        return self._digest.hexdigest()
