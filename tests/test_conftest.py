"""CI=1 makes a skipped test a failure, wherever it skips and however many processes run; expected failures stay."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPING = {
    "test": "import pytest\ndef test_it():\n    pytest.skip('no gpu')\n",
    "mark": "import pytest\n@pytest.mark.skipif(True, reason='no gpu')\ndef test_it(): pass\n",
    "fixture": "import pytest\n@pytest.fixture\ndef gpu():\n    pytest.skip('no gpu')\ndef test_it(gpu): pass\n",
    "module": "import pytest\npytest.skip('no gpu', allow_module_level=True)\n",
}
PASSING = {
    "one": "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_known(): assert False\ndef test_it(): pass\n"
}


def run(directory: Path, sources: dict[str, str], ci: str, processes: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).parent / "conftest.py", directory)
    for name, source in sources.items():
        (directory / f"test_{name}.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-n", processes, str(directory)]
    command += ["--continue-on-collection-errors", "-p", "xdist"]
    env = {**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the others take seconds to import
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, env=env)


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_skip_fails_in_ci_and_only_there(processes: str, tmp_path: Path) -> None:
    in_ci = run(tmp_path, SKIPPING, "1", processes)
    assert in_ci.returncode != 0 and "passed" not in in_ci.stdout
    for name in SKIPPING:
        outcome = "FAILED" if name == "test" else "ERROR"
        assert f"{outcome} test_{name}.py" in in_ci.stdout
    assert in_ci.stdout.count("skipped, which CI=1 counts as a failure") >= 4 and "no gpu" in in_ci.stdout
    elsewhere = run(tmp_path, SKIPPING, "", processes)
    assert elsewhere.returncode in (0, 5) and "4 skipped" in elsewhere.stdout  # 5: no test was left


def test_expected_failures_and_passes_are_no_skips(tmp_path: Path) -> None:
    done = run(tmp_path, PASSING, "1", "0")
    assert done.returncode == 0
    assert "1 passed, 1 xfailed" in done.stdout
