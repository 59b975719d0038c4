"""One model in two processes, each with a part of every layer; both choose the same tokens as one process alone.

python examples/tensor_parallel.py [MODEL]    a directory or hub id; without one, the demo checkpoint
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from torch.distributed import FileStore

from tritium import Engine, build
from tritium.config import RuntimeConfig
from tritium.runtime.gloo import GlooCommunicator
from tritium.testing.recorder import Recorder, greedy_request

NUM_RANKS = 2
CONFIG = RuntimeConfig(max_num_seqs=4, max_num_batched_tokens=32, kv_cache_memory=8 << 20, num_threads=1)
PROMPTS = ([5, 6, 7], [9, 8, 7, 6, 5, 4, 3], list(range(3, 40)))
NUM_TOKENS = 12


def generate(path: str, communicator: GlooCommunicator | None = None) -> list[list[int]]:
    """Greedy tokens of the prompts, in flight together. Every rank is given the same requests in the same order."""
    engine = Engine.load(path)
    recorder = Recorder(engine, CONFIG, communicator)
    requests = [greedy_request(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]
    recorder.run(requests)
    return [request.output_token_ids for request in requests]


def run_rank(rank: int, store: str, *paths: str) -> None:
    """What a rank's process does: print its tokens, a line for each engine."""
    communicator = GlooCommunicator(FileStore(store, NUM_RANKS), rank, NUM_RANKS)
    for path in paths:
        print(generate(path, communicator), flush=True)


def run_ranks(engines: list[list[Path]], store: Path) -> list[list[str]]:
    """Start a process a rank; engines[r] are what rank r opens. Each rank's printed lines."""
    commands = [
        [sys.executable, __file__, "--rank", str(rank), str(store), *map(str, engines[rank])]
        for rank in range(NUM_RANKS)
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    return [process.communicate(timeout=300)[0].splitlines() for process in processes]


def main() -> None:
    model = sys.argv[1] if sys.argv[1:] else "examples/demo_model"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        alone = build(model, output_dir=place / "alone", dtype="float32")
        ranks = [
            build(model, output_dir=place / f"rank-{rank}", dtype="float32", tensor_parallel=NUM_RANKS, rank=rank)
            for rank in range(NUM_RANKS)
        ]
        printed = run_ranks([[engine.path] for engine in ranks], place / "store")
        expected = str(generate(str(alone.path)))
        for engine, (line,) in zip(ranks, printed, strict=True):
            size = (engine.path / "weights.safetensors").stat().st_size
            print(f"{engine.path.name}: {size:,} bytes of weights, same tokens as alone: {line == expected}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(int(sys.argv[2]), *sys.argv[3:])
    else:
        main()
