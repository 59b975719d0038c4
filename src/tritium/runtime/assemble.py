"""Puts tokenizer, scheduler, executor and loop of an engine together."""

from typing import TYPE_CHECKING, Any

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.kernels.communicator import Communicator
from tritium.kernels.kernel import resolve
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.executor import Executor
from tritium.runtime.gpu.device import gpu_for
from tritium.runtime.overlap_loop import OverlapLoop
from tritium.runtime.ranks.executor import RankExecutor, Watch
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.scheduler_config import SchedulerConfig
from tritium.runtime.weight_updates import WeightUpdates
from tritium.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritium.runtime.gpu.encoder_runner import GpuEncoderRunner
    from tritium.runtime.gpu.executor import GpuExecutor


def load_tokenizer(engine: Engine) -> Tokenizer | None:
    """The engine's own tokenizer; None when it has none (a module without one was compiled)."""
    if not (engine.path / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_directory(engine.path, model_vocab_size=engine.plan.vocab_size)


def make_loop(
    engine: Engine,
    config: RuntimeConfig,
    tokenizer: Tokenizer | None,
    *,
    communicator: Communicator | None = None,
    watch: Watch | None = None,
) -> EngineLoop:
    """The loop of an engine, with all its memory. Call it on the thread that will run it.

    communicator: connects the ranks of an engine that is a part of a model; watch: is told of its steps.
    """
    executor = make_executor(engine, config, communicator)
    scheduler = make_scheduler(engine, config, executor)
    updates = WeightUpdates(scheduler, executor)
    stepping: Any = executor if watch is None else RankExecutor(executor, watch)
    kind = EngineLoop if isinstance(executor, Executor) else OverlapLoop
    return kind(scheduler, stepping, tokenizer, seed=config.seed, updates=updates)


def make_executor(
    engine: Engine, config: RuntimeConfig, communicator: Communicator | None = None
) -> "Executor | GpuExecutor":
    """The executor of the device that the engine was built for. Triton is loaded only for a GPU."""
    if engine.manifest.backend == "cuda":
        gpu_for(engine)  # where there is none, its executor cannot even be imported
        executor: GpuExecutor = resolve("tritium.runtime.gpu.executor:GpuExecutor")(
            engine, config, communicator=communicator
        )
        return executor
    return Executor(engine, config, communicator=communicator)


def make_encoder_runner(engine: Engine, config: RuntimeConfig) -> "EncoderRunner | GpuEncoderRunner":
    """The same of an encoder. Call it on the thread that will run it."""
    if engine.manifest.backend == "cuda":
        gpu_for(engine)
        runner: GpuEncoderRunner = resolve("tritium.runtime.gpu.encoder_runner:GpuEncoderRunner")(engine, config)
        return runner
    return EncoderRunner(engine, config)


def make_scheduler(engine: Engine, config: RuntimeConfig, executor: "Executor | GpuExecutor") -> Scheduler:
    """A scheduler with the limits that the executor's memory allows."""
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=executor.memory.max_model_len,
            block_size=config.block_size,
            num_blocks=executor.memory.num_blocks,
            windows=tuple(group.window for group in engine.plan.kv_groups) or (0,),
            policy=config.policy,
            enable_prefix_caching=config.enable_prefix_caching,
            fingerprint=engine.identity,
            weights_generation=engine.manifest.weights_generation,
            vocab_size=engine.plan.vocab_size,
        )
    )
