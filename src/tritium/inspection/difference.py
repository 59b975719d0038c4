"""What two engines do not have in common."""

import difflib
import json
from collections import Counter
from typing import Any

from tritium.engine.certificate import read_certificate
from tritium.engine.engine import Engine

MANIFEST_FIELDS = (
    "backend", "dtype", "scheme", "invariance", "kind", "max_model_len", "vocab_size", "eos_token_ids", "plugins",
    "weights_generation", "weights_source", "build", "matches", "versions", "model",
)  # fmt: skip
FILES = ("plan.json", "weights.safetensors", "recipes.json", "tactics.json")


def difference(first: Engine, second: Engine) -> dict[str, Any]:
    """By topic, only what differs: fields of the manifest, files, steps and kernels by count, recipes, certificate, and
    `graph`, the lines of a unified diff of the final graphs. Empty for equal engines."""
    found: dict[str, Any] = {}
    fields = {name: _pair(getattr(first.manifest, name), getattr(second.manifest, name)) for name in MANIFEST_FIELDS}
    found["manifest"] = {name: pair for name, pair in fields.items() if pair is not None}
    hashes = [
        {name: e.manifest.files[name].sha256 for name in FILES if name in e.manifest.files} for e in (first, second)
    ]
    found["files"] = [name for name in FILES if hashes[0].get(name) != hashes[1].get(name)]
    for topic, counts in {
        "steps": [Counter(step.op for step in e.plan.steps) for e in (first, second)],
        "kernels": [Counter(step.kernel for step in e.plan.steps) for e in (first, second)],
    }.items():
        names = sorted({*counts[0], *counts[1]})
        found[topic] = {n: [counts[0][n], counts[1][n]] for n in names if counts[0][n] != counts[1][n]}
    recipes = [json.loads((e.path / "recipes.json").read_text()) for e in (first, second)]
    names = sorted({*recipes[0], *recipes[1]})
    found["recipes"] = [name for name in names if recipes[0].get(name) != recipes[1].get(name)]
    found["certificate"] = _pair(*(_certificate(e) for e in (first, second)))
    before, after = ((e.path / "graph.txt").read_text().splitlines() for e in (first, second))
    found["graph"] = list(difflib.unified_diff(before, after, str(first.path), str(second.path), lineterm="", n=1))
    return {topic: value for topic, value in found.items() if value}


def _pair(first: Any, second: Any) -> list[Any] | None:
    """Both, when they differ; of two dicts only the keys that do."""
    if isinstance(first, dict) and isinstance(second, dict):
        names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
        first, second = ({name: one.get(name) for name in names} for one in (first, second))
    return None if first == second else [first, second]


def _certificate(engine: Engine) -> str:
    found = read_certificate(engine.path)
    return found.describe() if found is not None else "none"
