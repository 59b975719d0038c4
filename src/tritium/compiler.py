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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

import tritium
from tritium.calibrate.certify import certify
from tritium.config import BuildConfig, OptimizationProfile
from tritium.engine.certificate import CERTIFICATE_NAME, Certificate
from tritium.engine.engine import Engine
from tritium.engine.manifest import FileRecord, Manifest
from tritium.engine.plan import Plan
from tritium.engine.recipe_file import weight_specs
from tritium.engine.serialise import replace_text, staged, write_engine
from tritium.engine_weights import calibration_kind, engine_recipes, kept_recipes, stored_formats, unread_tensors
from tritium.errors import CaptureError, ConfigError
from tritium.example_inputs import ExampleInputs, ModuleInputs, read_example_inputs
from tritium.graph import dump
from tritium.graph.capture import TOKEN_INPUTS, Captured, InputSpec, capture
from tritium.graph.foreign import Targets, registered
from tritium.kernels.plugin import Plugin, load_plugins, plugin_ops
from tritium.models.decoder import Decoder
from tritium.models.encoder import Encoder
from tritium.passes import pipeline
from tritium.passes.encoder_pipeline import optimise_encoder
from tritium.passes.lower import lower_encoder, lower_module
from tritium.passes.module_pipeline import optimise_module
from tritium.passes.tables import check_tables
from tritium.quant.schemes import WeightFormat
from tritium.resolve import Model, ResolvedModel, Weights, learned_buffers, resolve_model, resolve_stateless
from tritium.runtime.gpu.device import check_kernels, check_tuning
from tritium.runtime.kernel_choice import choose_kernels
from tritium.stage_clock import Progress, StageClock
from tritium.tuner.tune_built import tune_built
from tritium.weights import bind, recipes
from tritium.weights.dummy import DummySource, is_kept_of_dummies
from tritium.weights.recipe_json import to_json

STAGES = ("resolve", "capture", "optimise", "lower", "kernels", "write", "certify", "tune")
DUMMY_SEED = 0
ENCODER_INPUTS = {**TOKEN_INPUTS, "token_types": InputSpec(torch.int64)}


@dataclass(frozen=True)
class Compiled:
    """A model as a plan, before it is bound to weights.

    graph_text, graph_json: the final graph. constants: tensors the model brings along, by weight name.
    weights: recipes of the weights that passes have made, over the module's own tensors.
    """

    plan: Plan
    graph_text: str
    graph_json: str
    constants: dict[str, torch.Tensor]
    matches: dict[str, int]
    weights: dict[str, recipes.Recipe]


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


def compile_module(
    module: nn.Module,
    config: BuildConfig,
    *,
    dtype: torch.dtype | None = None,
    max_model_len: int | None = None,
    plugins: Sequence[Plugin] = (),
    stored: Mapping[str, WeightFormat] | None = None,
    calibration: Mapping[str, torch.Tensor] | None = None,
    clock: StageClock | None = None,
) -> Compiled:
    """Capture, optimise and lower `module` and choose its kernels; touches no weight and no file.

    stored: the module's tensors that the checkpoint keeps quantised, and how. calibration: calibration tensors by name.
    """
    clock = clock or StageClock(None)
    with registered(plugin_ops(plugins)) as foreign:
        with clock.stage("capture"):
            captured = capture(module, dtype=dtype, max_model_len=max_model_len, blocks=_blocks(module))
        return _compile(
            captured, config, type(module).__name__, plugins, foreign, stored or {}, calibration or {}, clock
        )


def _compile(
    captured: Captured,
    config: BuildConfig,
    name: str,
    plugins: Sequence[Plugin],
    foreign: Targets,
    stored: Mapping[str, WeightFormat],
    calibration: Mapping[str, torch.Tensor],
    clock: StageClock,
) -> Compiled:
    with clock.stage("optimise"):
        optimised = pipeline.optimise(
            captured.graph,
            disabled=pipeline.left_out(config.disabled_passes, config.device),
            foreign=foreign,
            scheme=config.scheme,
            kv_dtype=config.kv_dtype,
            unquantized=config.unquantized,
            has_quantized_embedding=config.quantize_embedding,
            ranks=config.ranks,
            stored=stored if config.device == "cpu" else {},
            calibrated=calibration.keys(),
            device=config.device,
        )
        if not optimised.kv_groups:
            raise CaptureError(
                f"{name} has no causal attention. This version builds decoders only: write attention "
                "with tritium.ops.attention, or as torch's scaled_dot_product_attention(..., is_causal=True)"
            )
        if captured.restriction is not None:
            raise captured.restriction
    with clock.stage("lower"):
        plan = pipeline.to_plan(optimised)
    compiled = _compiled(plan, captured, optimised, config, clock, plugins)
    return dataclasses.replace(compiled, constants=compiled.constants | dict(calibration))


def compile_stateless(
    module: nn.Module, inputs: ModuleInputs, config: BuildConfig, *, clock: StageClock | None = None
) -> Compiled:
    """The same for a stateless module with these inputs. Raises `CaptureError` with the node that cannot be."""
    clock = clock or StageClock(None)
    with clock.stage("capture"):
        learned = learned_buffers(module)
        captured = capture(module, inputs=inputs.specs, is_by_name=inputs.is_by_name, learned=learned)
        if captured.restriction is not None:
            raise captured.restriction
    with clock.stage("optimise"):
        optimised = optimise_module(captured.graph, disabled=pipeline.left_out((), config.device))
    with clock.stage("lower"):
        plan = lower_module(optimised.graph, captured.outputs)
    return _compiled(plan, captured, optimised, config, clock)


def compile_encoder(module: nn.Module, config: BuildConfig, *, clock: StageClock | None = None) -> Compiled:
    """The same for an encoder."""
    assert isinstance(module, Encoder)
    clock = clock or StageClock(None)
    with clock.stage("capture"):
        captured = capture(module, inputs=ENCODER_INPUTS, blocks=_blocks(module))
    with clock.stage("optimise"):
        optimised = optimise_encoder(
            captured.graph,
            captured.outputs,
            module.row_outputs,
            disabled=pipeline.left_out(config.disabled_passes, config.device),
            scheme=config.scheme,
            unquantized=config.unquantized,
            has_quantized_embedding=config.quantize_embedding,
            device=config.device,
        )
    with clock.stage("lower"):
        plan = lower_encoder(optimised.graph, captured.outputs, module.config.vocab_size)
    return _compiled(plan, captured, optimised, config, clock)


def _blocks(module: nn.Module) -> str | None:
    """The list of blocks, of which equal ones are captured once; None for code that is not ours."""
    return "layers" if type(module).forward in (Decoder.forward, Encoder.forward) else None


def _compiled(
    plan: Plan,
    captured: Captured,
    optimised: pipeline.Optimised,
    config: BuildConfig,
    clock: StageClock,
    plugins: Sequence[Plugin] = (),
) -> Compiled:
    with clock.stage("kernels"):
        plan = _with_kernels(plan, config, plugins)
    return Compiled(
        plan=plan,
        graph_text=dump.to_text(optimised.graph),
        graph_json=dump.to_json(optimised.graph),
        constants=captured.constants | optimised.constants,
        matches=optimised.matches,
        weights=optimised.weights,
    )


def _with_kernels(plan: Plan, config: BuildConfig, plugins: Sequence[Plugin]) -> Plan:
    """The plan with the kernel that each step is to run on the configuration's device."""
    is_bitwise = config.resolved_invariance == "bitwise"
    chosen = zip(plan.steps, choose_kernels(plan, plugins, config.device, is_bitwise=is_bitwise), strict=True)
    return msgspec.structs.replace(plan, steps=tuple(msgspec.structs.replace(s, kernel=k.name) for s, k in chosen))


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


def compute_dtype(plan: Plan) -> str:
    """What a plan computes in: what its KV cache holds, unless that has 8 bits; then the dtype of its first output."""
    dtype = plan.kv_groups[0].dtype if plan.kv_groups else "int8"
    return plan.value(plan.results[0]).dtype if dtype in ("int8", "float8_e4m3fn") else dtype


def _config(config: BuildConfig | None, overrides: Mapping[str, Any]) -> BuildConfig:
    config = BuildConfig() if config is None else config
    if not isinstance(config, BuildConfig):
        raise ConfigError(f"config must be a BuildConfig, not {type(config).__name__}")
    return dataclasses.replace(config, **overrides)
