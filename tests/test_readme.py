"""The README is true: its Python runs, its commands exist, its model table is the code's, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import typer

from tritium.cli.main import app
from tritium.models.families import FAMILIES
from tritium.models.families.bert import ENCODERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/structure.md",
        "docs/dependencies.md",
        "docs/migrate.md",
        "docs/serving.md",
    )
]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language; "" for those that name none."""
    return [
        body
        for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
        if name == language
    ]


def test_the_python_example_runs_and_is_ten_lines() -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main(")


def test_every_command_it_shows_exists_with_its_flags() -> None:
    shown = [
        line
        for block in blocks("")
        for line in re.findall(r"tritium [^\n]*?(?=  +tritium|\n|$)", block)
        if "tritium/" not in line
    ]
    assert len(shown) >= 6
    for line in shown:
        words = line.replace("|", " ").split()[1:]
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in getattr(command, "params", []) for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for path in DOCUMENTS for target in re.findall(r"`make ([a-z-]+)", path.read_text())}
    named |= {target for block in blocks("") for target in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


def test_the_model_table_is_the_codes() -> None:
    named = re.findall(r"`(\w+(?:ForCausalLM|ForConditionalGeneration|LMHeadModel))`", README)
    assert set(named) == {f.architecture for f in FAMILIES}


def test_the_table_names_every_encoder() -> None:
    named = re.findall(r"`((?:Bert|Roberta|XLMRoberta)\w+)`", README.partition("## Models")[2])
    assert set(named) == {row.architecture for row in ENCODERS}


def test_links_and_named_files_exist() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
    structure = (ROOT / "docs/structure.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "tritium"
    for name in re.findall(r"`([\w/]+\.py)`", structure):
        assert (package / name).is_file() or list(package.rglob(name)), f"docs/structure.md names {name}"
