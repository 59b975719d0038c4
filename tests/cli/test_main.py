"""The command line's surface: commands and flags are frozen, help is light, errors are one line and an exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tritium import __version__
from tritium.cli.main import app

COMPILED = "--dtype --scheme --kv-dtype --quantize-embedding --device --max-model-len --tensor-parallel"
PLANNED = f"{COMPILED} --max-num-seqs --max-num-batched-tokens --kv-cache-memory --block-size"
NODES = "--num-nodes --rendezvous"
OPENED = f"{PLANNED} --num-threads {NODES} --plugin"
CHOSEN = "--max-tokens --min-tokens --temperature --top-k --top-p --min-p --seed --stop --ignore-eos"
FLAGS = {
    "build": f"MODEL --arch --dummy-weights --output --plugin --json {COMPILED} --unquantized --disable-pass --tune "
    "--block-size --certificate --max-mean-kl",
    "quantize": "MODEL --output --method --calibration --calibration-tokens --work-dir --json --unquantized "
    f"--disable-pass --tune --block-size --certificate --max-mean-kl {COMPILED}",
    "refit": "CHECKPOINT ENGINE --json",
    "inspect": "ENGINE --decode --html --json --no-timing --num-tokens --plugin",
    "diff": "FIRST SECOND --json --plugin",
    "bisect": "ENGINE --json --max-divergence --max-ratio --model --num-tokens --pass --plugin",
    "tune": "ENGINE --block-size --deny --effort --export --import --json --num-threads --plugin",
    "run": f"MODEL --prompt --input --output --json {CHOSEN} {OPENED}",
    "chat": f"MODEL --system --json {CHOSEN} {OPENED}",
    "serve": f"MODEL --api-key --drain-seconds --host --json --max-queue --max-connections --port --seed "
    f"--served-model-name --stall-seconds {PLANNED} --num-threads {NODES}",
    "join": f"MODEL --json --node-rank {COMPILED} {NODES} --plugin",
    "plan": f"MODEL --arch --gpu --json --memory {PLANNED}",
    "eval": f"MODEL --json --max-tokens --stride --text --window {OPENED}",
    "cache list": "--json",
    "cache prune": "--days --json",
    "bench throughput": "MODEL --arch --dummy-weights --num-prompts --input-len --output-len --temperature --seed "
    f"--json {OPENED}",
    "bench latency": "MODEL --arch --dummy-weights --num-prompts --input-len --output-len --concurrency --rate "
    f"--temperature --seed --json {OPENED}",
}


def commands(group: object, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        path = f"{prefix} {name}".strip()
        found |= commands(command, path) if hasattr(command, "commands") else {path: command}
    return found


COMMANDS = commands(typer.main.get_command(app))


def test_commands_and_flags_are_frozen() -> None:
    flags = {
        path: " ".join(
            sorted(max(p.opts, key=len) if p.opts[0].startswith("-") else p.name.upper() for p in command.params)
        )
        for path, command in COMMANDS.items()
    }
    assert flags == {path: " ".join(sorted(text.split())) for path, text in FLAGS.items()}


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_explains_itself_and_each_of_its_flags(path: str) -> None:
    command = COMMANDS[path]
    assert command.help.endswith(".")
    assert all(parameter.help for parameter in command.params)


def test_help_of_every_command_loads_neither_torch_nor_the_compiler() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom tritium.cli.main import app\n"
        f"for path in {['', *COMMANDS]!r}:\n"
        "    result = CliRunner().invoke(app, [*path.split(), '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, result.output\n"
        "heavy = [m for m in ('torch', 'numpy', 'tokenizers', 'tritium.compiler', 'tritium.llm') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_and_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "tritium", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"tritium {__version__}\n")


WRONG: dict[str, tuple[list[str], str, str]] = {
    "no such model": (["run", "no/such/model", "--prompt", "x"], "CheckpointError", "no/such/model"),
    "a file": (["run", __file__, "--prompt", "x"], "CheckpointError", "test_main.py"),
    "no prompt": (["run", "."], "ConfigError", "--prompt"),
    "both kinds of prompt": (["run", ".", "--prompt", "x", "--input", "y"], "ConfigError", "not both"),
    "input alone": (["run", ".", "--input", "y"], "ConfigError", "belong together"),
    "a wrong temperature": (["run", ".", "--prompt", "x", "--temperature", "nan"], "RequestError", "temperature"),
    "a wrong top-p": (["chat", ".", "--top-p", "1.5"], "RequestError", "top_p"),
    "a wrong device": (["chat", ".", "--device", "tpu"], "ConfigError", "cpu, cuda, not 'tpu'"),
    "a wrong dtype": (["run", ".", "--prompt", "x", "--dtype", "int4"], "ConfigError", "int4"),
    "an unknown shape": (
        ["build", "--arch", "lama-3-8b", "--dummy-weights", "--output", "x"],
        "ConfigError",
        "llama-3-8b",
    ),
    "a shape without weights": (["build", "--arch", "gpt2", "--output", "x"], "ConfigError", "--dummy-weights"),
    "a shape and a model": (["build", "m", "--arch", "gpt2", "--output", "x"], "ConfigError", "not both"),
    "nothing to build": (["build", "--output", "x"], "ConfigError", "--arch"),
    "no text to score": (["eval", ".", "--text", "no/such.txt"], "ConfigError", "no/such.txt"),
    "a window of 1": (
        ["eval", ".", "--text", "x", "--window", "1"],
        "ConfigError",
        "--window must be 2 or more, not 1",
    ),
    "nothing to measure": (["bench", "throughput"], "ConfigError", "name a model"),
    "two loads": (["bench", "latency", "m", "--rate", "2", "--concurrency", "3"], "ConfigError", "give one of them"),
    "no rate": (["bench", "latency", "m", "--rate", "0"], "ConfigError", "above 0, up to 1e+06, not 0.0"),
    "generation by an encoder": (
        ["bench", "throughput", "--arch", "bert-base", "--dummy-weights"],
        "ConfigError",
        "--arch bert-base is an encoder and generates no text, which is what is measured here; build it with "
        "`tritium build` and time LLM.embed",
    ),
    "latency of an encoder": (
        ["bench", "latency", "--arch", "roberta-base", "--dummy-weights"],
        "ConfigError",
        "--arch roberta-base is an encoder",
    ),
    "random weights for a model": (["bench", "throughput", "m", "--dummy-weights"], "ConfigError", "--arch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_one_line_an_exit_code_and_with_json_an_object(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, kind, fragment = WRONG[name]
    plain = CliRunner().invoke(app, arguments)
    assert plain.exit_code == 1
    assert plain.stdout == ""
    (line,) = plain.stderr.splitlines()
    assert line.startswith("error: ") and fragment in line
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    assert as_json.exit_code == 1
    error = json.loads(as_json.stdout)["error"]
    assert error["type"] == kind
    assert fragment in error["message"]
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_is_refused() -> None:
    result = CliRunner().invoke(app, ["run", "x", "--temprature", "1"])
    assert result.exit_code == 2
    assert "--temprature" in result.stderr
