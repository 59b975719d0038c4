"""CI=1 makes a skipped test a failure, wherever it skips; an expected failure stays one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPING = {
    "a test": "import pytest\ndef test_it():\n    pytest.skip('no gpu')\n",
    "a mark": "import pytest\n@pytest.mark.skipif(True, reason='no gpu')\ndef test_it(): pass\n",
    "a fixture": "import pytest\n@pytest.fixture\ndef gpu():\n    pytest.skip('no gpu')\ndef test_it(gpu): pass\n",
    "a module": "import pytest\npytest.skip('no gpu', allow_module_level=True)\n",
}
PASSING = "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_known():\n    assert False\ndef test_it(): pass\n"


def run(directory: Path, source: str, ci: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).parent / "conftest.py", directory)
    (directory / "test_one.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, env={**os.environ, "CI": ci})


@pytest.mark.parametrize("where", SKIPPING)
def test_a_skip_fails_in_ci_and_only_there(where: str, tmp_path: Path) -> None:
    in_ci = run(tmp_path, SKIPPING[where], ci="1")
    assert in_ci.returncode != 0
    assert "skipped, which CI=1 counts as a failure" in in_ci.stdout and "no gpu" in in_ci.stdout
    assert run(tmp_path, SKIPPING[where], ci="").returncode in (0, 5)  # 5: a module that skips itself has no tests


def test_expected_failures_and_passes_are_no_skips(tmp_path: Path) -> None:
    done = run(tmp_path, PASSING, ci="1")
    assert done.returncode == 0
    assert "1 passed, 1 xfailed" in done.stdout
