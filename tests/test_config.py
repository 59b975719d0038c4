"""What the machine allows, read from a cgroup tree made for the test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritium import config
from tritium.config import BuildConfig, ServerConfig
from tritium.errors import ConfigError

GB = 1 << 30


def put(directory: Path, **files: object) -> None:
    """Files by name, `__` for a dot."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def proc_and_root(tmp_path, monkeypatch):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    root.mkdir()
    real = config.cgroups
    monkeypatch.setattr(config, "cgroups", lambda controller: real(controller, proc, root))
    return proc, root


def test_page_cache_in_a_cgroup_counts_as_free(proc_and_root):
    proc, root = proc_and_root
    put(proc, cgroup="0::/")
    put(root, memory__max=GB, memory__current=GB - 1000, memory__stat="anon 5\nactive_file 4000\ninactive_file 6000")
    assert config.available_memory() == 11_000


def test_the_tightest_limit_on_the_way_to_the_root_counts(proc_and_root):
    proc, root = proc_and_root
    put(proc, cgroup="0::/user.slice/job")
    put(root / "user.slice", memory__max=5000, memory__current=1000, cpu__max="100000 100000")
    put(root / "user.slice" / "job", memory__max="max", memory__current=900, cpu__max="max 100000")
    assert config.available_memory() == 4000
    assert config.available_threads() == 1


def test_version_1_has_a_tree_for_each_controller_and_totals_of_its_own(proc_and_root):
    proc, root = proc_and_root
    put(proc, cgroup="4:memory:/job\n3:cpu,cpuacct:/outside/of/this/container\n0::/")
    put(root / "memory", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=7)
    put(
        root / "memory" / "job",
        memory__limit_in_bytes=9000,
        memory__usage_in_bytes=8000,
        memory__stat="inactive_file 1\ntotal_inactive_file 500\ntotal_active_file 20",
    )
    put(root / "cpu", cpu__cfs_quota_us=50_000, cpu__cfs_period_us=100_000)
    assert config.available_memory() == 1520
    assert config.available_threads() == 1


@pytest.mark.parametrize("line", ["0::/", "", "0::/gone"])
def test_without_limits_the_machine_decides(proc_and_root, line):
    proc, _ = proc_and_root
    put(proc, cgroup=line)
    assert config.available_memory() > 1 << 20
    assert config.available_threads() >= 1


def test_memory_used_beyond_the_limit_leaves_none(proc_and_root):
    proc, root = proc_and_root
    put(proc, cgroup="0::/")
    put(root, memory__max=1000, memory__current=2000)
    assert config.available_memory() == 0


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("1,4", 1), ("100000", 2), ("", 2), ("many", 2)])
def test_omp_num_threads_is_obeyed_when_it_is_a_number(proc_and_root, monkeypatch, value, expected):
    monkeypatch.setattr(config.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert config.available_threads() == expected


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_spinning_at_barriers_is_bounded_unless_the_user_says_otherwise(own):
    code = "import os, tritium; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    out = subprocess.run([sys.executable, "-c", code], env=plain | own, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [own.get("GOMP_SPINCOUNT", "None" if own else "10000")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "fp8"}, "scheme='fp8' is not for device='cpu', which has w8a8, w8a16"),
        (
            {"scheme": "w4a8_g32", "device": "cuda"},
            "'w4a8_g32' is not for device='cuda', which has fp8, w8a8",
        ),
    ],
)
def test_what_a_device_has_not_is_refused_with_what_to_say_instead(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**given)


def test_invariance_is_bitwise_on_a_cpu_and_fast_on_a_gpu_unless_said() -> None:
    assert BuildConfig().resolved_invariance == "bitwise"
    assert BuildConfig(device="cuda").resolved_invariance == "fast"
    assert BuildConfig(device="cuda", invariance="bitwise").resolved_invariance == "bitwise"
    assert BuildConfig(invariance="fast").resolved_invariance == "fast"


def test_the_server_listens_at_loopback_unless_told_otherwise() -> None:
    assert ServerConfig().host == "127.0.0.1"
    assert ServerConfig(host="0.0.0.0").host == "0.0.0.0"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_connections": 0}, "max_connections must be an integer from 1 to 1048576, not 0"),
        ({"max_body_bytes_in_all": 1 << 20}, "max_body_bytes_in_all must be an integer from 8388608 to"),
        ({"host": ""}, "host must be a name or an address, not ''"),
    ],
)
def test_what_a_server_cannot_be_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**fields)  # type: ignore[arg-type]
