"""The build in a child process."""

import pytest

from tritium.build_child import build_in_child
from tritium.config import BuildConfig
from tritium.errors import CheckpointError, EngineError


def test_the_child_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "msgspec.py").write_text("open('stolen', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        build_in_child("./no-model", BuildConfig(), tmp_path / "engine")
    assert not (tmp_path / "stolen").exists()


def test_what_is_to_run_on_a_gpu_is_not_built_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EngineError, match=r"device='cuda' was asked for, and torch .* no GPU here; leave it out"):
        build_in_child("./no-model", BuildConfig(device="cuda"), tmp_path / "engine")
