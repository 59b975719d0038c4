"""`make wheel` and what it gives: installed where there is no compiler, its kernels run, at every level of this CPU."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tritium import LLM, SamplingParams
from tritium.kernels.cpu import isa, library

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "demo_model"
BEST = isa.best(None, isa.cpu_flags()).name
SCRIPT = """
import json, sys
import tritium
from tritium import LLM, SamplingParams
from tritium.kernels.cpu import library, openmp
with LLM(sys.argv[1], num_threads=1, max_num_seqs=2, dtype="float32") as llm:
    kernels = sorted({step.kernel.split(".")[0] for step in llm.engine.plan.steps})
    output = llm.generate(["def main("], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0]
with open("/proc/self/maps") as maps:
    objects = sorted({line.split()[-1] for line in maps if "kernels" in line and ".so" in line})
found = {"objects": objects, "runtimes": len(openmp.loaded_runtimes()), "kernels": kernels, "text": output.text}
print(json.dumps(found | {"why_not": library.why_not(), "module": tritium.__file__}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make wheel` builds it."""
    output = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, ROOT / "dev" / "build_wheel.py", output], check=True)
    (made,) = output.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing but the wheel; what it depends on lies behind it, as installed here."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return home


@pytest.fixture(scope="module")
def expected_text() -> str:
    """What the kernels compiled here from the same sources give."""
    assert library.why_not() == ""
    with LLM(MODEL, num_threads=1, max_num_seqs=2, dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        return llm.generate(["def main("], params)[0].outputs[0].text


def test_it_is_for_any_linux_of_its_age_and_brings_an_object_for_each_level(wheel: Path) -> None:
    assert wheel.name.startswith("tritium-") and "manylinux" in wheel.name and wheel.name.endswith("x86_64.whl")
    names = zipfile.ZipFile(wheel).namelist()
    objects = {name for name in names if name.endswith(".so")}
    assert objects == {f"tritium/kernels/cpu/prebuilt/{level.name}.so" for level in isa.LEVELS}
    sources = {f"tritium/{path.relative_to(ROOT / 'src' / 'tritium')}" for path in (ROOT / "src").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert not [name for name in names if "gomp" in name]


@pytest.mark.parametrize("level", [None, *(level.name for level in isa.LEVELS if level.needs <= isa.cpu_flags())])
def test_without_a_compiler_the_kernels_that_it_brings_run(
    level: str | None, installed: Path, expected_text: str, tmp_path: Path
) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    left_out = ("PYTHONPATH", "CXX", "TRITIUM_CPU_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"PATH": str(empty), "TRITIUM_CACHE": str(tmp_path / "cache")}
    environment |= {} if level is None else {"TRITIUM_CPU_LEVEL": level}
    command = [installed / "bin" / "python", "-c", SCRIPT, MODEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{level or 'no level asked for'}: {found['objects']}")
    assert found["why_not"] == "" and found["runtimes"] == 1 and found["kernels"] == ["cpu"]
    assert [Path(path).name for path in found["objects"]] == [f"{level or BEST}.so"]
    assert all(path.startswith(str(installed)) for path in (*found["objects"], found["module"]))
    assert not (tmp_path / "cache" / "kernels").exists()
    assert found["text"] == expected_text and len(expected_text) > 8
