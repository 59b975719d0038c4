"""Fails when a source file has more than 400 lines: a file that wants to is two files."""

import subprocess
import sys
from pathlib import Path

MAX_LINES = 400
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".md", ".toml"}


def main() -> int:
    """Print every file that is too long; the exit code says whether there was one."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [Path(name) for name in listed if Path(name).suffix in SUFFIXES and Path(name).is_file()]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    too_long = {path: length for path, length in lengths.items() if length > MAX_LINES}
    for path, length in too_long.items():
        print(f"{path}: {length} lines, more than {MAX_LINES}")
    if not too_long:
        print(f"{len(lengths)} files, the longest has {max(lengths.values(), default=0)} lines")
    return bool(too_long)


if __name__ == "__main__":
    sys.exit(main())
