"""Levels of instructions: which one a CPU gets, which it may be told to take, and what is said of one it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritium.errors import ConfigError
from tritium.kernels.cpu import isa, prebuilt

HASWELL = frozenset({"sse4_2", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
SKYLAKE_X = HASWELL | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
ICE_LAKE = SKYLAKE_X | {"avx512_vnni"}
ZEN_4 = ICE_LAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_tile", "amx_int8", "amx_bf16", "avx_vnni"}


@pytest.mark.parametrize(
    ("has", "name"),
    [
        (SAPPHIRE_RAPIDS, "amx"),
        (SAPPHIRE_RAPIDS - {"amx_int8"}, "avx512_bf16"),
        (ZEN_4, "avx512_bf16"),
        (ICE_LAKE, "avx512_vnni"),
        (SKYLAKE_X, "avx2"),
        (HASWELL | {"avx_vnni"}, "avx2_vnni"),
        (HASWELL, "avx2"),
        (HASWELL - {"fma"}, "x86_64"),
        (frozenset(), "x86_64"),
    ],
)
def test_a_cpu_gets_the_first_level_whose_instructions_it_has(has: frozenset[str], name: str) -> None:
    assert isa.best(None, has).name == name


def test_a_lesser_level_can_be_asked_for_and_one_that_is_not_there_is_refused_with_those_that_are() -> None:
    assert isa.best("x86_64", ZEN_4).name == "x86_64"
    with pytest.raises(ConfigError, match=r"TRITIUM_CPU_LEVEL is 'amx', but this CPU lacks amx_bf16, amx_int8, amx_ti"):
        isa.best("amx", ZEN_4)
    with pytest.raises(ConfigError, match=r"is 'avx9', which is no level of instructions; here: avx2, x86_64$"):
        isa.best("avx9", HASWELL)


def test_an_installation_with_objects_takes_the_one_of_its_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "cpu_flags", lambda: ICE_LAKE)
    monkeypatch.delenv("TRITIUM_CPU_LEVEL", raising=False)
    assert prebuilt.path() is None  # a source tree has none
    monkeypatch.setattr(prebuilt, "DIRECTORY", tmp_path)
    assert prebuilt.path() is None
    for name in ("avx512_vnni", "avx2"):
        (tmp_path / f"{name}.so").touch()
    assert prebuilt.path() == tmp_path / "avx512_vnni.so"
    monkeypatch.setenv("TRITIUM_CPU_LEVEL", "avx2")
    assert prebuilt.path() == tmp_path / "avx2.so"
    monkeypatch.setenv("TRITIUM_CPU_LEVEL", "amx")
    with pytest.raises(ConfigError, match="'amx', but this CPU lacks"):
        prebuilt.path()


def test_a_wrong_level_stops_a_process_instead_of_running_without_kernels() -> None:
    script = "from tritium.kernels.cpu import library; print(library.why_not())"
    environment = {**os.environ, "TRITIUM_CPU_LEVEL": "avx9"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "TRITIUM_CPU_LEVEL is 'avx9', which is no level of instructions" in done.stderr
