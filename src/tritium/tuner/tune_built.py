"""The tuner at the end of a build: an engine that is whole is kept, tuned or not."""

from pathlib import Path

from tritium.config import BuildConfig
from tritium.engine.engine import Engine
from tritium.errors import EngineError
from tritium.stage_clock import StageClock
from tritium.tuner.timing_cache import TimingCache
from tritium.tuner.tune import environment_of, tune_engine


def tune_built(engine: Engine, config: BuildConfig, place: Path, clock: StageClock) -> EngineError | None:
    """Do what `tritium tune` does to an engine that will stand at `place`; what to raise when it does, if that fails.

    Minutes of work on weights are not thrown away for what may be a GPU that is busy: the engine is as good without
    times, those that were taken are in the cache, and to tune it again is a command.
    """
    try:
        cache = TimingCache(environment_of(engine, block_size=config.tune_block_size))
        tune_engine(engine, config.tune, cache, progress=lambda done, of, _: clock.report("tune", done, of))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is raised, and the engine kept
        blocks = "" if config.tune_block_size is None else f" --block-size {config.tune_block_size}"
        failure = EngineError(
            f"{place} is built, and tuning it failed ({type(error).__name__}: {error}): it runs by defaults; `tritium "
            f"tune {place} --effort {config.tune}{blocks}` goes on from the times that are known"
        )
        failure.__cause__ = error
        return failure
    return None
