"""The hash that is made on the way is the file's."""

import hashlib

import pytest
import torch

from tritium.weights import hashed_file
from tritium.weights.hashed_file import HashedFile


def test_the_hash_is_that_of_the_file_whatever_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(hashed_file, "PIECE", 1000)
    parts = [torch.randint(0, 256, (size,), dtype=torch.uint8).numpy() for size in (7, 1000, 0, 2500)]
    with HashedFile(tmp_path / "file") as file:
        for part in parts:
            file.write(part.data)
    assert (tmp_path / "file").read_bytes() == b"".join(part.tobytes() for part in parts)
    assert file.sha256 == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_a_file_that_is_there_is_not_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError), HashedFile(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
