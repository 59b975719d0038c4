"""Two processes share a model: each has half of its weights, and both choose the tokens that one process chooses."""

import importlib.util
import json
import shutil
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore
from typer.testing import CliRunner

from tritium import LLM, SamplingParams, ops
from tritium.cli.main import app
from tritium.compiler import build
from tritium.config import BuildConfig, RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.manifest import is_engine
from tritium.errors import ConfigError, EngineError, KernelError
from tritium.inspection.report import make_report
from tritium.kernels.eager.collectives import bind_all_gather, bind_all_reduce
from tritium.kernels.kernel import LaunchContext
from tritium.models import EncoderConfig
from tritium.runtime.executor import Executor
from tritium.runtime.gloo import GlooCommunicator
from tritium.runtime.kernel_choice import choose_kernels
from tritium.runtime.loaded_weights import bytes_in_use
from tritium.runtime.ranks.alike import describe_model
from tritium.runtime.ranks.launch import open_loop
from tritium.testing.quantized_checkpoints import awq_writer, quantize_checkpoint
from tritium.testing.tiny_models import TINY_MODELS, make_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TINY_MODELS["llama"] | {"vocab_size": 200}  # which two ranks can share
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "model", config)


@pytest.fixture(scope="module")
def halves(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Engine]:
    """The engines of both ranks."""
    place = tmp_path_factory.mktemp("ranks")
    return [build(checkpoint, output_dir=place / str(r), tensor_parallel=2, rank=r) for r in range(2)]


@pytest.fixture(scope="module")
def both(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The first of them, of a build for both."""
    return build(checkpoint, output_dir=tmp_path_factory.mktemp("ranks") / "both", tensor_parallel=2)


@pytest.mark.full
def test_the_example_shares_a_model_whose_ranks_choose_the_tokens_of_one_process(checkpoint, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("tensor_parallel", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["tensor_parallel.py", str(checkpoint)])
    example.main()
    *sizes, same = capsys.readouterr().out.splitlines()
    whole, half = (int(line.split()[4].replace(",", "")) for line in sizes)
    assert half < 0.6 * whole and same == "same tokens: True"


PROMPTS = ([5, 6, 7], [9, 8, 7, 6, 5, 4, 3], list(range(3, 40)))
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "kv_cache_memory": 8 << 20, "num_threads": 1}


def tokens(engine: Engine) -> list[list[int]]:
    """Greedy tokens of the prompts, in flight together."""
    with LLM(engine.path, **LIMITS) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_progress=False)]


@pytest.mark.full
@pytest.mark.parametrize("name", ["gptj", "mixtral", "bloom", "gemma2", "qwen3"])
def test_families_of_every_kind_can_be_shared(name, tmp_path) -> None:
    model = make_checkpoint(tmp_path / "model", name)
    alone = build(model, output_dir=tmp_path / "alone")
    shared = build(model, output_dir=tmp_path / "shared", tensor_parallel=2)
    assert shared.manifest.matches["shard"] >= 2
    expected = tokens(alone)
    assert tokens(shared) == expected
    assert len({token for one in expected for token in one}) > 8  # no constant answer


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


@pytest.mark.full
def test_a_checkpoint_that_is_dequantised_as_it_is_read_can_be_shared(checkpoint, tmp_path) -> None:
    """AWQ with zeros: no kernel takes it as it is, so its weights are floats, and each rank has its part of them."""
    model = quantize_checkpoint(checkpoint, tmp_path / "awq", AWQ, awq_writer(32, None))
    alone = build(model, output_dir=tmp_path / "alone")
    shared = build(model, output_dir=tmp_path / "shared", tensor_parallel=2)
    assert tokens(shared) == tokens(alone)


def test_a_rank_has_its_part_of_the_weights_and_of_the_kv_cache(halves) -> None:
    for rank, half in enumerate(halves):
        assert half.manifest.mapping == {"tensor_parallel": 2, "rank": rank}
        assert [group.num_kv_heads for group in half.plan.kv_groups] == [1]
        assert [step.op for step in half.plan.steps].count("all_reduce") == 1 + 3 * 2  # embedding; two a layer
        assert half.plan.steps[-1].op == "all_gather"
    trees = [json.loads((half.path / "recipes.json").read_text()) for half in halves]
    assert trees[0].keys() == trees[1].keys() and trees[0] != trees[1]


RUNTIME = RuntimeConfig(max_num_seqs=2, max_num_batched_tokens=8, kv_cache_memory=1 << 20, num_threads=1)


class Alone:
    """A communicator whose peers send what they are told to."""

    def __init__(self, *parts: torch.Tensor, rank: int = 0) -> None:
        self.rank, self.num_ranks, self.parts = rank, len(parts), parts

    def smallest(self, numbers: list[int]) -> list[int]:
        return numbers

    def close(self) -> None: ...

    def all_gather(self, parts, x) -> None:
        for part, sent in zip(parts, self.parts, strict=True):
            part.copy_(sent)


def test_a_part_of_a_model_does_not_run_alone(halves) -> None:
    with pytest.raises(EngineError, match=r"is rank 1 of 2, a part of a model: run every rank's engine"):
        Executor(halves[1], RUNTIME)


def test_a_part_of_a_model_is_looked_into_without_timing_it(halves) -> None:
    report = make_report(halves[0], num_tokens=8, is_decode=False, is_measured=False)
    assert [step.op for step in report.steps].count("all_reduce") == 1 + 3 * 2
    with pytest.raises(EngineError, match=r"is a part of a model: steps of whole models are timed; give --no-timing"):
        make_report(halves[0], num_tokens=8, is_decode=False)


def test_a_rank_is_not_taken_for_another(halves) -> None:
    with pytest.raises(EngineError, match=r"is rank 1 of 2, the communicator is rank 0 of 3: give each process"):
        Executor(halves[1], RUNTIME, communicator=Alone(*torch.zeros(3, 1)))


def test_what_was_learned_of_whole_weights_is_not_shared(checkpoint, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel=2: what calibration has learned .*: quantise without it"):
        build(
            checkpoint, output_dir=tmp_path / "engine", tensor_parallel=2, rank=0, calibration={"w": torch.ones(1)}
        )  # fmt: skip


@pytest.mark.parametrize("option", [{"tune": "quick"}, {"certificate": "quick"}])
def test_what_ranks_cannot_have_is_refused(option) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=f"tensor_parallel=2 does not go with {name}='{value}': leave {name} out"):
        BuildConfig(tensor_parallel=2, **option)


def test_without_a_rank_the_engines_of_all_are_built_side_by_side(both, halves) -> None:
    place = both.path.parent
    assert sorted(path.name for path in place.iterdir()) == ["rank-0", "rank-1"] and both.path == place / "rank-0"
    assert [Engine.load(place / f"rank-{r}").identity for r in range(2)] == [half.identity for half in halves]
    assert Engine.load(place).path == both.path and is_engine(place)


def test_what_a_rank_takes_is_planned(both) -> None:
    result = CliRunner().invoke(app, ["plan", str(both.path.parent), "--memory", str(1 << 30), "--json"])
    found = json.loads(result.stdout)
    assert found["config"]["tensor_parallel"] == 2 and found["workspace_bytes"] > 0
    assert found["weights_bytes"] == bytes_in_use(both.plan, choose_kernels(both.plan))


def test_a_refit_gives_new_weights_to_every_rank(both, halves, checkpoint, tmp_path) -> None:
    refitted = both.refit(checkpoint)
    ranks = [refitted, Engine.load(both.path.parent / "rank-1")]
    assert [engine.manifest.weights_generation for engine in ranks] == [1, 1]
    assert [engine.identity for engine in ranks] == [half.identity for half in halves]  # of equal weights
    alone = Engine.load(shutil.copytree(ranks[0].path, tmp_path / "alone")).refit(checkpoint)
    assert alone.manifest.weights_generation == 2
    with pytest.raises(
        EngineError, match=r"rank-1 is no engine: .*alone is rank 0 of 2, .* build them with tensor_par"
    ):
        open_loop(alone, RUNTIME, None)
    with pytest.raises(EngineError, match=r"rank-1 is rank 1 of 2: open the first rank's engine, or the directory of"):
        open_loop(ranks[1], RUNTIME, None)
    with pytest.raises(ConfigError, match=r"plugin 5 is an object, which other processes cannot have: name it as 'mod"):
        open_loop(ranks[0], RUNTIME, None, plugins=[5])


def kernels(model: Path, place: Path, scheme: str | None, num_ranks: int) -> Counter[str]:
    """Of an engine for GPUs, which is built here and run where they are."""
    kept = {"device": "cuda", "dtype": "bfloat16", "scheme": scheme, "tensor_parallel": num_ranks}
    engine = build(model, output_dir=place / f"{num_ranks}", **kept)
    return Counter(step.kernel for step in engine.plan.steps)


def test_in_fp8_a_rank_keeps_its_part_of_the_logits_linear_as_it_is(tmp_path) -> None:
    model = make_checkpoint(tmp_path / "model", TINY_MODELS["llama"] | {"vocab_size": 256, "hidden_size": 128})
    found = kernels(model, tmp_path, "fp8", 2)
    assert (found["gpu.linear_fp8"], found["gpu.linear"], found["gpu.all_reduce"]) == (3 * 4, 1, 1 + 3 * 2)


@pytest.mark.full
@pytest.mark.parametrize("scheme", [None, "fp8", "w8a8", "w8a16", "w4a16_g128"])
def test_a_rank_on_a_gpu_runs_the_kernels_of_a_whole_model_and_collectives(scheme, tmp_path) -> None:
    model = make_checkpoint(tmp_path / "model", TINY_MODELS["llama"] | {"vocab_size": 256, "hidden_size": 128})
    added = {"gpu.all_reduce": 1 + 3 * 2, "eager.all_gather": 1, "gpu.embedding_part": 1}
    assert kernels(model, tmp_path, scheme, 2) - kernels(model, tmp_path, scheme, 1) == added


def test_the_smallest_rank_says_how_large_the_kv_cache_is(halves) -> None:
    class Smaller(Alone):
        def smallest(self, numbers: list[int]) -> list[int]:
            return [min(pair) for pair in zip(numbers, (3, 32), strict=True)]

    executor = Executor(halves[0], RUNTIME, communicator=Smaller(*torch.zeros(2, 1)))
    memory = executor.memory
    assert (memory.num_blocks, memory.max_model_len, memory.num_tokens, memory.num_sequences) == (3, 32, 32, 1)


def test_a_rank_beyond_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank must be an integer from 0 to 1, not 2"):
        BuildConfig(tensor_parallel=2, rank=2)


def test_an_encoder_is_not_shared(tmp_path) -> None:
    config = EncoderConfig(architecture="BertModel", vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1,
                           num_heads=2, num_positions=16, num_token_types=2)  # fmt: skip
    with pytest.raises(ConfigError, match="tensor_parallel=2 is for decoders: leave it out for an encoder"):
        build(config, weights="dummy", output_dir=tmp_path / "engine", tensor_parallel=2)


def test_sums_of_ranks_are_made_in_fp32_in_their_order() -> None:
    parts = [torch.randn(5, 7).to(torch.bfloat16) for _ in range(3)]
    out = torch.full((5, 7), torch.nan, dtype=torch.bfloat16)
    bind_all_reduce({"x": parts[0]}, [out], LaunchContext(communicator=Alone(*parts)))()
    assert torch.equal(out, (parts[0].float() + parts[1].float() + parts[2].float()).to(torch.bfloat16))


def test_logits_of_ranks_stand_side_by_side() -> None:
    parts = [torch.randn(5, 7) for _ in range(2)]
    out = torch.full((5, 14), torch.nan)
    bind_all_gather({"x": parts[0], "num_ranks": 2}, [out], LaunchContext(communicator=Alone(*parts)))()
    assert torch.equal(out, torch.cat(parts, -1))


def test_a_collective_without_its_ranks_says_so() -> None:
    with pytest.raises(KernelError, match="all_reduce needs a communicator in its launch context"):
        bind_all_reduce({"x": torch.ones(1)}, [torch.ones(1)], LaunchContext())
    with pytest.raises(KernelError, match="all_gather is of 3 ranks, the communicator connects 2"):
        context = LaunchContext(communicator=Alone(*torch.zeros(2, 1)))
        bind_all_gather({"x": torch.ones(1), "num_ranks": 3}, [torch.ones(3)], context)


def test_the_parts_of_a_table_add_up_to_it() -> None:
    table, ids = torch.randn(12, 5), torch.tensor([0, 11, 5, 6, 3])
    parts = [ops.embedding_part(ids, table[start : start + 6], start) for start in (0, 6)]
    assert torch.equal(parts[0] + parts[1], table[ids])
    assert (parts[0] == 0).all(-1).tolist() == [False, True, False, True, False]


def test_ranks_that_are_lost_are_an_error() -> None:
    class Lost:
        def allgather(self, *_: object) -> None:
            raise RuntimeError("connection closed by peer")

    ranks = object.__new__(GlooCommunicator)
    ranks.rank, ranks.num_ranks, ranks._group = 1, 2, Lost()  # type: ignore[assignment]
    with pytest.raises(EngineError, match=r"rank 1 of 2 lost the others: connection closed by peer"):
        ranks.all_gather([torch.ones(1)] * 2, torch.ones(1))


def test_ranks_that_do_not_come_are_an_error(tmp_path) -> None:
    store = FileStore(str(tmp_path / "store"), 2)
    with pytest.raises(EngineError, match=r"rank 0 of 2 did not find the others: .*; start all of them"):
        GlooCommunicator(store, 0, 2, timeout=timedelta(milliseconds=300))


def test_ranks_that_an_interrupted_refit_has_parted_are_alike_after_the_next(halves, checkpoint, tmp_path) -> None:
    place = tmp_path / "shared"
    for rank, engine in enumerate(halves):
        shutil.copytree(engine.path, place / f"rank-{rank}")
    shutil.copytree(place / "rank-1", tmp_path / "before")
    Engine.load(place).refit(checkpoint)
    shutil.rmtree(place / "rank-1")
    (tmp_path / "before").rename(place / "rank-1")  # as when the process ends between the two

    first = Engine.load(place).refit(checkpoint)
    second = Engine.load(place / "rank-1")
    assert first.manifest.weights_generation == second.manifest.weights_generation == 2
    assert describe_model(first) == describe_model(second)
