"""A machine without a GPU says so in one line, whoever asks, and before anything is built for nothing."""

import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tritium import LLM, build, models
from tritium.cli.main import app
from tritium.compiled import compile_module
from tritium.config import BuildConfig, RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import ConfigError, EngineError
from tritium.models.hf_config import parse_config
from tritium.runtime.engine_process import load_worker
from tritium.runtime.gpu import device
from tritium.runtime.kernel_choice import choose_kernels
from tritium.testing.plain_models import PlainLlama
from tritium.testing.stateless_models import ImageClassifier, inputs_for
from tritium.testing.tiny_configs import TINY_MODELS
from tritium.testing.tiny_encoders import make_encoder

DEMO = str(Path(__file__).parents[2] / "examples" / "demo_model")
ASKED = "device='cuda' was asked for, and torch .* finds no GPU here; leave it out to run on the CPU"
COMMANDS = {
    "run": ["run", DEMO, "--prompt", "x"],
    "chat": ["chat", DEMO],
    "throughput": ["bench", "throughput", DEMO],
    "latency of a shape": ["bench", "latency", "--arch", "gpt2", "--dummy-weights"],
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    config = parse_config(TINY_MODELS["llama"], "llama", dtype="bfloat16")
    return build(config, output_dir=tmp_path_factory.mktemp("gpu") / "engine", weights="dummy", device="cuda")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_it_in_one_line_and_builds_nothing(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*COMMANDS[command], "--device", "cuda"])
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: device='cuda' was asked for") and "leave it out" in line
    assert not (tmp_path / "cache").exists()


def test_ranks_that_have_no_gpu_each_are_said_before_anything_is_built_or_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "_find_gpu", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        EngineError, match=r"tensor_parallel=2 .* needs as many GPUs, and torch finds 1 here: say at most 1"
    ):
        LLM(DEMO, device="cuda", tensor_parallel=2)
    assert not (tmp_path / "cache").exists()
    config = parse_config(TINY_MODELS["llama"], "llama", dtype="bfloat16")
    kept = {"weights": "dummy", "device": "cuda", "tensor_parallel": 2}
    engine = build(config, output_dir=tmp_path / "engine", **kept)  # type: ignore[arg-type]
    with pytest.raises(
        EngineError, match=r"engine is for 2 GPUs a machine, and torch finds 1 here: .* smaller tensor_par"
    ):
        LLM(engine.path)


def test_an_engine_for_a_gpu_says_which_command_builds_one_for_the_cpu(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"was built for an NVIDIA GPU, .* no GPU here; .*tritium build .* --device"):
        LLM(engine.path)
    with pytest.raises(EngineError, match=ASKED):
        LLM(engine.path, device="cuda")


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "find_spec", lambda name: None if name == "triton" else importlib.util.find_spec(name))
    with pytest.raises(EngineError, match=r"Triton, in which .* is not installed: pip install triton"):
        device.gpu_for(engine)


def test_an_encoder_is_built_for_a_gpu_and_says_that_there_is_none(tmp_path: Path) -> None:
    path, _ = make_encoder(tmp_path / "model", "BertModel")
    built = build(path, output_dir=tmp_path / "engine", device="cuda")
    assert built.manifest.backend == "cuda" and built.manifest.invariance == "fast"
    for open_it in (lambda: LLM(built.path), lambda: load_worker(built, RuntimeConfig())):
        with pytest.raises(
            EngineError, match=r"was built for an NVIDIA GPU, .* no GPU here; .*tritium build .*model --"
        ):
            open_it()


def test_an_encoder_in_fp8_must_be_in_bfloat16(tmp_path: Path) -> None:
    shape = models.encoder_preset("bert-base")
    with pytest.raises(ConfigError, match=r"scheme='fp8' with dtype='float32': .* give dtype='bfloat16' with it"):
        build(shape, output_dir=tmp_path / "engine", weights="dummy", device="cuda", scheme="fp8")
    assert not (tmp_path / "engine").exists()


def test_a_stateless_module_is_built_for_a_gpu_and_says_that_there_is_none(tmp_path: Path) -> None:
    module = ImageClassifier().eval()
    built = build(module, example_inputs=inputs_for(module, 2), output_dir=tmp_path / "engine", device="cuda")
    assert "gpu.linear" in {step.kernel for step in built.plan.steps}
    with pytest.raises(EngineError, match=r"was built for an NVIDIA GPU, .* finds no GPU here; build it for the CPU"):
        built.run(**inputs_for(module, 2))


def test_a_gpu_without_fp8_units_is_told_which_schemes_it_can_run() -> None:
    plan = compile_module(PlainLlama(size=128, num_heads=4), BuildConfig(scheme="fp8", device="cuda")).plan
    kernels = choose_kernels(plan, device="cuda")
    device.check_capability(kernels, "L40S", (8, 9))
    with pytest.raises(EngineError, match=r"gpu\..*_fp8 needs compute capability 8\.9, and A10 has 8\.6: .*w8a8"):
        device.check_capability(kernels, "A10", (8, 6))
