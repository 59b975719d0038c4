"""`build`: a model becomes an engine directory. The pipeline of DESIGN §1, one call per stage.

resolve    what was given: module, recipes, weights' source
capture    torch.export on meta tensors -> graph
optimise   passes/pipeline.py
lower      graph -> plan
kernels    the kernel of each step
write      weights streamed through their recipes, everything into a temporary directory, one rename
certify    the engine compared with the checkpoint in fp32, when the configuration says so
tune       kernels and tactics timed on this machine or its GPU, when the configuration says so
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tritium
from tritium.calibrate.certify import certify
from tritium.compiled import Compiled, compile_encoder, compile_module, compile_stateless, compute_dtype
from tritium.config import BuildConfig, OptimizationProfile
from tritium.engine.certificate import CERTIFICATE_NAME, Certificate
from tritium.engine.engine import Engine
from tritium.engine.manifest import FileRecord, Manifest
from tritium.engine.plan import Plan
from tritium.engine.recipe_file import weight_specs
from tritium.engine.serialise import replace_text, staged, write_engine
from tritium.engine_weights import calibration_kind, engine_recipes, kept_recipes, stored_formats, unread_tensors
from tritium.errors import ConfigError
from tritium.example_inputs import ExampleInputs, read_example_inputs
from tritium.kernels.plugin import Plugin, load_plugins
from tritium.passes.tables import check_tables
from tritium.resolve import Model, ResolvedModel, Weights, resolve_model, resolve_stateless
from tritium.runtime.gpu.device import check_kernels, check_tuning
from tritium.runtime.kernel_choice import choose_kernels
from tritium.stage_clock import Progress, StageClock
from tritium.tuner.tune_built import tune_built
from tritium.weights import bind
from tritium.weights.dummy import DummySource, is_kept_of_dummies
from tritium.weights.recipe_json import to_json

STAGES = ("resolve", "capture", "optimise", "lower", "kernels", "write", "certify", "tune")
DUMMY_SEED = 0


def build(
    model: Model,
    config: BuildConfig | None = None,
    *,
    output_dir: str | Path,
    example_inputs: ExampleInputs | None = None,
    profile: OptimizationProfile | None = None,
    weights: Weights = None,
    plugins: Sequence[Plugin | str] = (),
    calibration: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> Engine:
    """Compile `model` into an engine at `output_dir` and open it.

    model: a Hugging Face directory or hub id, a module `forward(input_ids [T], positions [T]) -> logits [T, V]`, or a
        ModelConfig, or an EncoderConfig. With `example_inputs`, any module that keeps no state between calls.
    example_inputs: tensors [batch, ...] by the names of forward's parameters, or a tuple in their order; only dtypes
        and sizes count. `Engine.run` takes tensors by these names.
    profile: the batches that such an engine is for; unset, 1 to 64.
    weights: a state dict in place of the model's own; "dummy": random ones, of which no file is written.
    plugins: ops and kernels of your own, as `Plugin` objects or "module:name"; who runs the engine gives them again.
    calibration: what a method has learned of the model for this scheme (`tritium.quantize` makes and passes it).
    overrides: fields of `BuildConfig`.
    progress(stage, done, total) is called as work proceeds; stages are `STAGES`, the last counts bytes of weights.

    With `tensor_parallel` and no `rank`, `output_dir` gets an engine for each rank, and the first is opened.

    An engine that is already at `output_dir` is replaced; after an error it is as it was, but where tuning fails: the
    new one is there then, not tuned, and the error says how to go on. Raises `ConfigError`, `CheckpointError`,
    `CaptureError`, `KernelError` or `EngineError`.
    """
    config = _config(config, overrides)
    if config.tensor_parallel > 1 and config.rank is None:
        known: Any = {"weights": weights, "plugins": plugins, "calibration": calibration, "progress": progress}
        return _build_ranks(model, config, output_dir, example_inputs=example_inputs, profile=profile, **known)
    check_tuning(config.device, config.tune)
    own = load_plugins(plugins)
    if own and example_inputs is not None:
        raise ConfigError("plugins are for decoders: the steps of a stateless module are torch's own ops")
    clock = StageClock(progress)
    if example_inputs is None:
        if profile is not None:
            raise ConfigError(f"profile={profile!r} is for stateless modules: give example_inputs with it")
        with clock.stage("resolve"):
            resolved = resolve_model(model, config, weights)
        if resolved.encoder is not None:
            for name, plain in (("kv_dtype", "auto"), ("tune_block_size", None)):
                if (given := getattr(config, name)) != plain:
                    raise ConfigError(f"{name}={given!r}: an encoder has no KV cache; leave it out")
        if resolved.encoder is not None:
            compiled = compile_encoder(resolved.module, config, clock=clock)
        else:
            known = {"dtype": resolved.dtype, "max_model_len": resolved.max_model_len, "plugins": own}
            known |= {"stored": stored_formats(resolved.recipes, resolved.source), "calibration": calibration}
            compiled = compile_module(resolved.module, config, **known, clock=clock)
        check_tables(compiled.plan, resolved.max_model_len)
        if config.device == "cuda" and config.tune != "none":  # it will run here: say now what is too new for this GPU
            is_bitwise = config.resolved_invariance == "bitwise"
            check_kernels(choose_kernels(compiled.plan, own, config.device, is_bitwise=is_bitwise))
    else:
        profile = profile or OptimizationProfile()
        with clock.stage("resolve"):
            resolved = resolve_stateless(model, config, weights)  # type: ignore[arg-type]  # it says what else is refused
            inputs = read_example_inputs(resolved.module, example_inputs)
        compiled = compile_stateless(resolved.module, inputs, config, clock=clock)
    failure, place = None, Path(os.path.abspath(output_dir))
    with staged(output_dir) as path:  # what fails its certificate takes nobody's place
        with clock.stage("write"):
            _write(resolved, compiled, config, own, path, clock, profile)
        if config.certificate != "none":
            with clock.stage("certify"):
                _certify(Engine.load(path, plugins=own), resolved, compiled, config)
        if config.tune != "none" and example_inputs is None:
            with clock.stage("tune"):
                failure = tune_built(Engine.load(path, plugins=own), config, place, clock)
    if failure is not None:
        raise failure
    return Engine.load(place, plugins=own)


def _build_ranks(model: Model, config: BuildConfig, output_dir: str | Path, **known: Any) -> Engine:
    """Each rank's engine in a directory of its own in `output_dir`, all of them in one step."""
    with staged(output_dir) as path:
        for rank in range(config.tensor_parallel):
            build(model, dataclasses.replace(config, rank=rank), output_dir=path / f"rank-{rank}", **known)
    return Engine.load(Path(os.path.abspath(output_dir)), plugins=known["plugins"])


def _certify(engine: Engine, resolved: ResolvedModel, compiled: Compiled, config: BuildConfig) -> None:
    """Write the certificate into the engine, or raise."""
    what = {"encoder": "an encoder", "decoder": "dummy weights"}
    skipped = what.get(engine.manifest.kind, "a stateless module")
    if engine.manifest.kind != "decoder" or resolved.source is None:
        certificate = Certificate(effort=config.certificate, skipped=skipped)
    else:
        certificate = certify(
            engine,
            resolved.module,
            resolved.recipes,
            resolved.source,
            compiled.constants,
            config.certificate,
            max_mean_kl=config.max_mean_kl,
        )
    replace_text(engine.path, engine.manifest, CERTIFICATE_NAME, certificate.encode())


def _write(
    resolved: ResolvedModel,
    compiled: Compiled,
    config: BuildConfig,
    plugins: Sequence[Plugin],
    output_dir: Path,
    clock: StageClock,
    profile: OptimizationProfile | None,
) -> Path:
    specs = weight_specs(compiled.plan)
    trees, specs = engine_recipes(specs, resolved.recipes, compiled.weights, compiled.constants)
    is_dummy = resolved.source is None
    if is_dummy:  # the runtime generates what comes from a checkpoint; constants and what is quantised are kept
        specs = {name: spec for name, spec in specs.items() if is_kept_of_dummies(trees[name], config.device)}

    def write_weights(path: Path) -> FileRecord:
        start = time.perf_counter()
        source = resolved.source or DummySource.for_recipes(
            [trees[name] for name in specs], compute_dtype(compiled.plan), DUMMY_SEED
        )
        more: Any = {"constants": compiled.constants, "progress": lambda _, *done: clock.report("write", *done)}
        written = bind.bind(trees, specs, source, path, **more)
        clock.record("write", start)
        return FileRecord(*written)

    manifest = Manifest(
        backend=config.device,
        model={"name": resolved.name, "architecture": resolved.architecture, "source": resolved.origin},
        dtype=compute_dtype(compiled.plan),
        scheme=config.scheme,
        calibration=calibration_kind(trees),
        invariance=config.resolved_invariance,
        kind=compiled.plan.kind,
        profile=None if profile is None else dataclasses.asdict(profile),
        encoder=resolved.encoder,
        max_model_len=resolved.max_model_len,
        vocab_size=compiled.plan.vocab_size,
        bos_token_id=resolved.bos_token_id,
        eos_token_ids=resolved.eos_token_ids,
        dummy_seed=DUMMY_SEED if is_dummy else None,
        ignored_tensors=unread_tensors(trees, resolved.source),
        plugins=_used(plugins, compiled.plan),
        mapping=dataclasses.asdict(config.ranks) if config.tensor_parallel > 1 else {},
        build=dataclasses.asdict(config),
        versions={"tritium": tritium.__version__, "torch": str(torch.__version__)},
        timings=clock.seconds,  # the same dict: "write" is in it by the time the manifest, the last file, is written
        matches=compiled.matches,
    )
    return write_engine(
        output_dir,
        manifest=manifest,
        plan=compiled.plan,
        texts={
            "graph.txt": compiled.graph_text,
            "graph.json": compiled.graph_json,
            "recipes.json": json.dumps({name: to_json(tree) for name, tree in kept_recipes(trees).items()}, indent=1)
            + "\n",
        },
        write_weights=write_weights if specs else None,
        model_dir=resolved.model_dir,
    )


def _used(plugins: Sequence[Plugin], plan: Plan) -> dict[str, str]:
    """The versions of the plugins that a step needs, for its op or its kernel."""
    named = {name.partition(".")[0] for step in plan.steps for name in (step.op, step.kernel)}
    return {plugin.name: plugin.version for plugin in plugins if plugin.name in named}


def _config(config: BuildConfig | None, overrides: Mapping[str, Any]) -> BuildConfig:
    config = BuildConfig() if config is None else config
    if not isinstance(config, BuildConfig):
        raise ConfigError(f"config must be a BuildConfig, not {type(config).__name__}")
    return dataclasses.replace(config, **overrides)
