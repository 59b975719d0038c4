"""Rules for every test: no network, a cache of its own, and in CI no skips."""

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

IS_CI = os.environ.get("CI", "") not in ("", "0", "false")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as tritium sets it; here torch may be imported first
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core; what wants more threads in a test says so
os.environ.setdefault("TRITIUM_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "tritium"))

# Two cores may be shared with anything, so no example has a deadline; CI draws the same examples always.
hypothesis.settings.register_profile("tritium", deadline=None, derandomize=IS_CI)
hypothesis.settings.load_profile("tritium")


ONE_PROCESS = ("tests/server/",)  # directories whose files share a fixture that is dear to make twice


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a file's tests run in one process, which makes its engines once; files go out in their order."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((d for d in ONE_PROCESS if nodeid.startswith(d)), nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # it would leave files of few, long tests for the end
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def fixed_numbers() -> None:
    """The same draws from torch in every run and every order of tests; tests without torch stay without it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failed one under CI=1: what CI does not run, nobody runs."""
    report = yield
    _fail_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole module that skips itself."""
    report = yield
    _fail_skipped(report)
    return report


def _fail_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IS_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=1 counts as a failure: {report.longrepr}"
