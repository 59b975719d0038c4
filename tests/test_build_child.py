"""The build in a child process."""

import pytest

from tritium.build_child import build_in_child
from tritium.config import BuildConfig
from tritium.errors import CheckpointError


def test_the_child_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "msgspec.py").write_text("open('stolen', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        build_in_child("./no-model", BuildConfig(), tmp_path / "engine")
    assert not (tmp_path / "stolen").exists()
