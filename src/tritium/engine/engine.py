"""`Engine`: an engine directory, opened. Loading reads JSON and safetensors only; nothing in it is executed."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch

from tritium.engine.check import check_plan
from tritium.engine.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    TACTICS_NAME,
    Manifest,
    check_files,
    rank_directories,
    rank_directory,
    read_manifest,
)
from tritium.engine.plan import PLAN_VERSION, Plan
from tritium.engine.refit import Progress, refit_directory
from tritium.engine.serialise import WEIGHTS_NAME
from tritium.engine.tactics import Tactics, read_tactics
from tritium.errors import EngineError
from tritium.kernels.kernel import resolve
from tritium.kernels.plugin import Plugin, load_plugins, plugin_ops

BACKENDS = ("cpu", "cuda")
_RUNNER = "tritium.runtime.module_runner:ModuleRunner"  # by name: the runtime stands above the engine that it opens
_opening = threading.Lock()


@dataclass(frozen=True)
class Engine:
    """An engine directory whose manifest and plan are read and checked. `build` makes one.

    `LLM` runs a language model's; `run` that of a stateless module. `close`, or the end of a `with`, gives back what
    `run` has taken.
    """

    path: Path
    manifest: Manifest
    plan: Plan
    plugins: tuple[Plugin, ...] = ()

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False, plugins: Sequence[Plugin | str] = ()) -> "Engine":
        """Open an engine directory; of one with the engines of all ranks, the first. plugins: those it was built with,
        themselves or as "module:name".

        Files under 32 MiB are always checked against their sha256; larger ones by size, and by hash with `verify`.
        Raises `EngineError`, naming the file and what to do, when one is missing, truncated, damaged or of a newer
        version, when the engine is for another backend, or when its plan is not one that a compiler writes, naming
        the value or step. Never imports the compiler.
        """
        path = rank_directory(path)
        manifest = read_manifest(path)
        if manifest.backend not in BACKENDS:
            raise EngineError(
                f"{path / MANIFEST_NAME}: this engine is for {manifest.backend!r}, this Tritium runs on "
                f"{', '.join(BACKENDS)}; "
                f"build it again: tritium build {manifest.model.get('source', 'MODEL')} --device cpu"
            )
        check_files(path, manifest, verify=verify)
        if PLAN_NAME not in manifest.files:
            raise _incomplete(path, PLAN_NAME)
        needed = _needed_plugins(path, manifest, load_plugins(plugins))
        plan = _read_plan(path / PLAN_NAME)
        try:
            check_plan(plan, plugin_ops(needed))
        except EngineError as error:
            raise EngineError(f"{path / PLAN_NAME}: {error}") from None
        has_weights = any(value.kind == "weight" for value in plan.values)
        if has_weights and manifest.dummy_seed is None and WEIGHTS_NAME not in manifest.files:
            raise _incomplete(path, WEIGHTS_NAME)
        return cls(path=path, manifest=manifest, plan=plan, plugins=needed)

    def refit(self, source: Mapping[str, torch.Tensor] | str | Path, *, progress: Progress | None = None) -> "Engine":
        """Give the engine on disk other weights, and open it again. Never imports the compiler.

        source: a state dict, a checkpoint directory or a hub id, with the names and shapes of the model that the engine
            was built from; dtypes may be any floating ones. The plan stays as it is, and the result is bit for bit what
            a build from `source` gives. progress(bytes written, bytes in all) is called as work proceeds.

        Everything is checked before anything is written; until the last moment, also when the process is killed, the
        old engine is whole. Processes that run the engine keep the weights they have (`LLM.update_weights` changes
        those). Of a model that ranks share all engines are refitted, one after the other; none is run while they
        differ, and the next refit makes them alike. Raises `CheckpointError` that names each tensor which is missing,
        left over or does not fit, and `EngineError` when the engine cannot be written.
        """
        own, others = self.path.absolute(), rank_directories(self.path, self.manifest)
        ranks = [self if path == own else Engine.load(path, plugins=self.plugins) for path in others]
        generation = 1 + max(rank.manifest.weights_generation for rank in ranks)
        for rank in ranks:
            refit_directory(rank.path, rank.manifest, rank.plan, source, progress, generation=generation)
        return Engine.load(self.path, plugins=self.plugins)

    def run(self, **tensors: Any) -> dict[str, torch.Tensor]:
        """Compute one batch of a stateless module: its named inputs [batch, ...], torch or numpy -> its named outputs.

        Outputs are torch tensors on the CPU, also those of an engine for a GPU, unless all its inputs lie on that GPU:
        then they stay there, in the order of the caller's current stream.
        Loads the weights at the first call. Threads may call it at once: batches are computed one after another on a
        thread of the engine's own. An id that a table has no row for gives NaN. Raises `RequestError` for inputs that
        are not the module's (name, dtype, sizes, a batch outside the profile), `EngineError` for an engine that is no
        stateless module or is closed, or a step that fails.
        """
        with _opening:
            if self._closed.is_set():
                raise EngineError(f"{self.path} was closed: open it again with Engine.load")
            runner = self._runner
        found: dict[str, torch.Tensor] = runner.run(tensors)
        return found

    def close(self) -> None:
        """Give back what `run` has taken: weights and activations, a GPU's to other programs too, and the thread.

        Batches that were begun are computed first; `run` raises `EngineError` from now on. What `run` has returned
        stays. May be called again. An `LLM` that was opened with this engine goes on: it has its own `close`.
        """
        with _opening:
            self._closed.set()
            runner = self.__dict__.pop("_runner", None)
        if runner is not None:
            runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @cached_property
    def _closed(self) -> threading.Event:
        return threading.Event()

    @cached_property
    def _runner(self) -> Any:
        return resolve(_RUNNER)(self)

    @cached_property
    def tactics(self) -> Tactics | None:
        """What the tuner chose, when it has run; `EngineError` when its file is damaged."""
        return read_tactics(self.path) if TACTICS_NAME in self.manifest.files else None

    @property
    def identity(self) -> str:
        """A hash of plan and weights: KV blocks are worth sharing only between equal ones."""
        names = [name for name in (PLAN_NAME, WEIGHTS_NAME) if name in self.manifest.files]
        return "-".join([*(self.manifest.files[name].sha256 for name in names), str(self.manifest.dummy_seed)])

    @property
    def weights_path(self) -> Path | None:
        """The safetensors file, or None when every weight is generated (`manifest.dummy_seed`)."""
        return self.path / WEIGHTS_NAME if WEIGHTS_NAME in self.manifest.files else None


def _incomplete(path: Path, name: str) -> EngineError:
    return EngineError(f"{path / MANIFEST_NAME} does not list {name}: the engine is incomplete; build it again")


def _needed_plugins(path: Path, manifest: Manifest, given: tuple[Plugin, ...]) -> tuple[Plugin, ...]:
    """Those of `given` that the engine was built with. `EngineError` names one that is absent or of another version."""
    by_name = {plugin.name: plugin for plugin in given}
    for name, version in manifest.plugins.items():
        if name not in by_name:
            raise EngineError(
                f"{path / MANIFEST_NAME}: this engine was built with the plugin {name!r}, version {version}, which was "
                "not given: pass it, as LLM(..., plugins=[...]) or --plugin module:name"
            )
        if by_name[name].version != version:
            raise EngineError(
                f"{path / MANIFEST_NAME}: this engine was built with version {version} of plugin {name!r}, given is "
                f"{by_name[name].version}: give that version, or build the engine again"
            )
    return tuple(by_name[name] for name in manifest.plugins)


def _read_plan(path: Path) -> Plan:
    try:
        version = msgspec.json.decode(path.read_bytes(), type=dict).get("version")
        if version != PLAN_VERSION:
            raise EngineError(
                f"{path} has plan version {version!r}, this Tritium runs {PLAN_VERSION}: build the engine again"
            )
        return msgspec.json.decode(path.read_bytes(), type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} is damaged ({error}): build the engine again") from None
