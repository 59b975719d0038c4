"""`tritium cache`: lists what was built on first use, and removes what was not used for long."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tritium.cli.main import app


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    for name, days in (("new-1", 1), ("old-2", 40)):
        path = tmp_path / "engines" / name
        path.mkdir(parents=True)
        (path / "manifest.json").write_text('{"format": "tritium-engine"}')
        os.utime(path, (time.time() - days * 86_400,) * 2)
    (tmp_path / "engines" / "not-an-engine").mkdir()
    return tmp_path / "engines"


def tritium(*arguments: str):
    return CliRunner().invoke(app, ["cache", *arguments], catch_exceptions=False)


def test_list_names_engines_the_latest_first(engines: Path) -> None:
    result = tritium("list")
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["new-1", "old-2"]
    assert str(engines) in result.stderr and "2 engines" in result.stderr
    report = json.loads(tritium("list", "--json").stdout)
    assert [Path(entry["path"]).name for entry in report["engines"]] == ["new-1", "old-2"]
    assert report["bytes"] == 2 * len('{"format": "tritium-engine"}')


def test_prune_removes_only_what_was_not_used_for_so_long(engines: Path) -> None:
    report = json.loads(tritium("prune", "--days", "30", "--json").stdout)
    assert [Path(entry["path"]).name for entry in report["removed"]] == ["old-2"]
    assert sorted(path.name for path in engines.iterdir()) == ["new-1", "not-an-engine"]
    assert "1 engine removed" in tritium("prune", "--days", "0").stderr
    assert [path.name for path in engines.iterdir()] == ["not-an-engine"]


def test_an_empty_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path / "new"))
    assert tritium("list").exit_code == 0
