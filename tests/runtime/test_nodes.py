"""Ranks of several machines: who is let in, who is not, and one model over two of them (here: two on this machine)."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import ConfigError, EngineError
from tritium.runtime.ranks.launch import open_loop
from tritium.runtime.ranks.nodes import Door, come
from tritium.testing.tiny_models import TINY_MODELS, make_checkpoint, random_prompt

SECRET = b"sixteen letters!"


@pytest.fixture
def door() -> Iterator[Door]:
    one = Door(("127.0.0.1", 0), SECRET)
    yield one
    one.close()


def in_thread(door: Door, secret: bytes, rank: int, num_ranks: int) -> "SimpleQueue[socket.socket | EngineError]":
    """What comes of coming to the door."""
    result: SimpleQueue[socket.socket | EngineError] = SimpleQueue()

    def run() -> None:
        try:
            result.put(come(("127.0.0.1", door.port), secret, rank, num_ranks, 5))
        except EngineError as error:
            result.put(error)

    threading.Thread(target=run, daemon=True).start()
    return result


def test_ranks_that_know_the_secret_are_let_in_by_their_number(door: Door) -> None:
    coming = {rank: in_thread(door, SECRET, rank, 4) for rank in (3, 2)}
    admitted = door.admit([2, 3], 4, 20)
    for rank in (2, 3):
        connection = coming[rank].get(timeout=20)
        assert isinstance(connection, socket.socket)
        connection.sendall(bytes([rank]))
        assert admitted[rank].recv(1) == bytes([rank])
        connection.close()
        admitted[rank].close()


@pytest.mark.parametrize(
    ("secret", "rank", "num_ranks", "said"),
    [(b"another secret!!", 1, 2, "it closed the connection"), (SECRET, 1, 4, None), (SECRET, 5, 2, None)],
)
def test_whoever_does_not_belong_there_is_not(
    door: Door, secret: bytes, rank: int, num_ranks: int, said: str | None
) -> None:
    coming = in_thread(door, secret, rank, num_ranks)
    with pytest.raises(
        EngineError, match=r"of 2 ranks these did not come within 0\.2 s: 1; run `tritium join` on their"
    ):
        door.admit([1], 2, 0.2)
    found = coming.get(timeout=20)
    if said is None:  # it knows the secret: it hears nothing more
        assert isinstance(found, socket.socket) and found.recv(1) == b""
        found.close()
    else:
        assert f"rank {rank} of {num_ranks} was not let in at" in str(found) and said in str(found)


def test_a_first_rank_that_is_not_there_is_said_with_its_address() -> None:
    with pytest.raises(EngineError, match=r"rank 0 of 2 was not at 127\.0\.0\.1:1 within 0 s: .*refused; start it"):
        come(("127.0.0.1", 1), SECRET, 1, 2, 0)


def test_an_impostor_at_the_address_learns_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(bytes(32))
            connection.recv(1 << 10)
            connection.sendall(bytes(32))

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(
            EngineError, match=r"it does not know the secret; give both sides the same secret, tensor_par"
        ):
            come(listener.getsockname(), SECRET, 1, 2, 5)


def test_a_door_that_cannot_be_is_said_with_its_address(door: Door) -> None:
    with pytest.raises(
        ConfigError, match=rf"rendezvous=127\.0\.0\.1:{door.port} cannot be listened at: .* a free port"
    ):
        Door(("127.0.0.1", door.port), SECRET)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_nodes": 2}, r"num_nodes=2 with rendezvous=None: several machines need one"),
        ({"rendezvous": "a:1"}, r"num_nodes=1 with rendezvous='a:1': .* one needs none"),
        ({"num_nodes": 2, "rendezvous": "here"}, r"rendezvous must be host:port, like 10\.0\.0\.1:29500, not 'here'"),
        ({"num_nodes": 2, "rendezvous": "a:99999"}, "rendezvous must be host:port"),
    ],
)
def test_what_is_no_way_to_meet_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RuntimeConfig(**given)  # type: ignore[arg-type]


LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "kv_cache_memory": 1 << 20, "num_threads": 1}
PROMPTS = [random_prompt(length, 199, seed=length) for length in (3, 17, 40)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens(path: Path, **nodes: object) -> list[list[int]]:
    with LLM(path, **LIMITS, **nodes) as llm:
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS, use_progress=False)]


def children_of(pid: int) -> list[int]:
    return [int(p) for path in Path(f"/proc/{pid}/task").glob("*/children") for p in path.read_text().split()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its engine, and those of its four ranks."""
    place = tmp_path_factory.mktemp("nodes")
    model = make_checkpoint(place / "model", TINY_MODELS["llama"] | {"vocab_size": 200})
    build(model, output_dir=place / "alone")
    build(model, output_dir=place / "shared", tensor_parallel=4)
    return place


@pytest.mark.full
def test_two_machines_with_two_ranks_each_answer_as_one_process_and_meet_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITIUM_RENDEZVOUS_SECRET", "a secret of the test's own")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--num-nodes", "2", "--node-rank", "1", "--rendezvous", address]
    second = subprocess.Popen([sys.executable, "-m", "tritium", "join", str(place / "shared"), *flags])
    try:
        expected = tokens(place / "alone")
        for _ in range(2):  # the second time the other machine's ranks have come again
            assert tokens(place / "shared", num_nodes=2, rendezvous=address) == expected
        with LLM(place / "shared", num_nodes=2, rendezvous=address, **LIMITS) as llm:
            for pid in children_of(second.pid):
                os.kill(pid, signal.SIGKILL)
            reason = r"rank [23] of 4 of another machine closed its connection"
            (out,) = llm.generate([PROMPTS[0]], PARAMS, use_progress=False)
            assert re.search(reason, out.error or "")
            with pytest.raises(EngineError, match=reason):
                llm.generate([PROMPTS[0]], PARAMS, use_progress=False)
    finally:
        second.terminate()
        assert second.wait(60) == 0


@pytest.mark.full
def test_several_machines_without_a_secret_or_with_a_part_of_a_rank_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(place / "shared")
    monkeypatch.delenv("TRITIUM_RENDEZVOUS_SECRET", raising=False)
    nodes = {"num_nodes": 2, "rendezvous": "127.0.0.1:29599"}
    with pytest.raises(
        ConfigError, match=r"TRITIUM_RENDEZVOUS_SECRET has 0 characters: .* set the same on all of them"
    ):
        open_loop(engine, RuntimeConfig(**nodes), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_nodes=3: 4 ranks are no whole number on each of them"):
        open_loop(engine, RuntimeConfig(**{**nodes, "num_nodes": 3}), None)  # type: ignore[arg-type]
    command = [sys.executable, "-m", "tritium", "join", str(place / "shared"), "--node-rank", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITIUM_RENDEZVOUS_SECRET": "x"})
    assert done.returncode != 0 and "one machine has nobody to join; say --num-nodes and --rendezvous" in done.stderr
