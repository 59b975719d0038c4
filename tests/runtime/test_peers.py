"""The first rank's end of the others, which are small scripts here: whatever one does, there is one clear end."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from tritium.errors import EngineError, OutOfMemory
from tritium.runtime.ranks import peers
from tritium.runtime.ranks.messages import Connect, Loaded, Opened, StartRank, Turn
from tritium.runtime.ranks.peers import Peers

BEGIN = """
import os, socket, sys, time
from tritium.runtime.ranks.messages import *
from tritium.wire import Failed, FrameBuffer, frame
connection = socket.socket(fileno=int(sys.argv[1]))
say = lambda message: connection.sendall(frame(message))
say(Loaded("this model", {}))
"""
WAIT = "while connection.recv(1 << 16): pass"  # as long as the first rank is there


@pytest.fixture
def start() -> Iterator[Callable[[str], Peers]]:
    """One more rank that runs a script, from after it has said that it is there."""
    started: list[Peers] = []

    def run(script: str) -> Peers:
        given = StartRank("engine", 1, 2, 1, {}, [])
        started.append(Peers([given], (sys.executable, "-c", BEGIN + script)))
        return started[-1]

    yield run
    for one in started:
        one.close()


def test_what_a_rank_cannot_load_is_raised_as_what_it_is(start: Callable[[str], Peers]) -> None:
    one = start("say(Failed('OutOfMemory', 'the model does not fit: give less'))\n" + WAIT)
    with pytest.raises(OutOfMemory, match="rank 1 of 2: the model does not fit: give less"):
        one.wait(Opened)


def test_a_rank_that_ends_says_how_it_ended(start: Callable[[str], Peers]) -> None:
    one = start("sys.exit(3)")
    with pytest.raises(EngineError, match="rank 1 of 2 ended with exit code 3"):
        one.wait(Opened)


def test_a_rank_that_has_only_lost_others_is_the_reason_when_nobody_else_is(
    start: Callable[[str], Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_OTHERS_SECONDS", 0.05)
    one = start("say(Failed('LostRanks', 'it lost the others')); sys.exit(1)")
    with pytest.raises(EngineError, match="rank 1 of 2: it lost the others"):
        one.wait(Opened)


def test_a_rank_that_ends_without_a_word_is_the_reason_of_those_who_lost_it(start: Callable[[str], Peers]) -> None:
    starts = [StartRank("engine", rank, 3, rank, {}, []) for rank in (1, 2)]
    script = BEGIN + (
        "number = FrameBuffer().feed(connection.recv(1 << 16)); rank = TO_RANK.decode(number[0]).rank\n"
        "rank == 1 and say(Failed('LostRanks', 'it lost the others')); time.sleep(0.2); sys.exit(rank)"
    )
    both = Peers(starts, (sys.executable, "-c", script))
    with pytest.raises(EngineError, match="rank 2 of 3 ended with exit code 2"):
        both.wait(Opened)
    both.close()


def test_a_rank_that_chooses_another_token_ends_all(start: Callable[[str], Peers]) -> None:
    let_go: list[bool] = []
    one = start("connection.recv(1 << 16); time.sleep(0.1); say(Chosen(2, 12345))\n" + WAIT)
    one.on_failure = lambda: let_go.append(True)
    assert [message.model for message in one.wait(Loaded)] == ["this model"]
    with one.working():
        one.chose([5, 6])
        one.chose([7, -1])
    one.send(Turn([]))
    one._thread.join(20)
    with (
        pytest.raises(EngineError, match=r"chose other tokens than rank 0 by step 2: its GPU or .* differ"),
        one.working(),
    ):
        pass
    assert let_go == [True]


def test_a_word_that_comes_before_the_step_has_ended_here_is_compared_later(start: Callable[[str], Peers]) -> None:
    one = start("say(Chosen(1, 12345)); say(Opened())\n" + WAIT)
    one.wait(Opened)
    one.chose([5, 6])
    with pytest.raises(EngineError, match="chose other tokens than rank 0 by step 1"), one.working():
        pass


def test_a_rank_that_is_lost_ends_a_wait_for_it(start: Callable[[str], Peers]) -> None:
    others = threading.Event()
    one = start("connection.recv(1 << 16); os._exit(3)")
    with pytest.raises(EngineError, match="rank 1 of 2 ended with exit code 3"):
        one.unless_lost(others.wait)
    others.set()


def test_what_is_raised_while_others_are_waited_for_comes_out(start: Callable[[str], Peers]) -> None:
    one = start(WAIT)
    assert one.unless_lost(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        one.unless_lost(lambda: 1 // 0)


def test_whatever_the_thread_fails_at_is_the_end_of_all(
    start: Callable[[str], Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Peers, "_note", lambda *_: 1 // 0)
    with pytest.raises(EngineError, match="rank 0 of 2 cannot hear the others: ZeroDivisionError"):
        start(WAIT).wait(Loaded)


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineError, match=r"a rank's process cannot be started by '/not/there': .*No such file"):
        Peers([StartRank("engine", 1, 2, 1, {}, [])], ("/not/there",))


def test_a_step_that_never_ends_is_ended(start: Callable[[str], Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "STEP_SECONDS", 0.2)
    one = start(WAIT)
    with pytest.raises(EngineError, match=r"no step of 2 ranks ended within 0\.2 s"), one.working():
        one._thread.join(20)
        raise ConnectionError("gloo or NCCL lets go")


def test_what_fails_here_is_the_end_of_all(start: Callable[[str], Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_CAUSE_SECONDS", 0.05)  # nobody else has a reason
    one = start(WAIT)
    with pytest.raises(EngineError, match="rank 0 of 2 failed: ZeroDivisionError: division by zero"), one.working():
        1 / 0  # noqa: B018
    with pytest.raises(EngineError, match="rank 0 of 2 failed"):
        one.wait(Opened)
    one.send(Connect("nowhere"))  # to nobody
    assert one.failure is not None and "rank 0 of 2 failed" in str(one.failure)


def test_a_word_that_is_none_ends_all(start: Callable[[str], Peers]) -> None:
    one = start("connection.sendall(b'\\0\\0\\0\\2hi')\n" + WAIT)
    with pytest.raises(EngineError, match="rank 1 of 2 said what cannot be read: "):
        one.wait(Opened)
