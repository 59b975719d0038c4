"""What server and engine process say to each other: frames survive any cutting, and nothing else is accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium import wire
from tritium.errors import EngineError
from tritium.wire import (
    Abort,
    Commands,
    FrameBuffer,
    Output,
    Report,
    Submit,
    TokenLogprob,
    decode_for_engine,
    decode_for_server,
    frame,
    frames,
)

COMMANDS = Commands([Submit("a", [1, 2], {"seed": (1 << 64) - 1, "stop": ["x"]}, True), Abort("b")])
REPORT = Report(
    [Output("a", "é", [7], [TokenLogprob(7, -0.5, [(7, -0.5), (8, float("-inf"))])], "stop", "x")],
    {"num_running": 1},
    3,
)


@given(st.lists(st.integers(1, 40), min_size=1))
def test_frames_come_out_whole_however_they_were_cut(cuts: list[int]) -> None:
    data = frame(COMMANDS) + frame(REPORT) + frame(Commands([]))
    buffer, bodies, start = FrameBuffer(), [], 0
    while start < len(data):
        size = cuts[start % len(cuts)]
        bodies += buffer.feed(data[start : start + size])
        start += size
    assert [decode_for_engine(bodies[0]), decode_for_server(bodies[1]), decode_for_engine(bodies[2])] == [
        COMMANDS,
        REPORT,
        Commands([]),
    ]


def test_a_length_that_no_message_has_is_refused_with_the_number() -> None:
    with pytest.raises(EngineError, match=r"a frame of 4294967295 bytes came .* at most 268435456 may"):
        FrameBuffer().feed(b"\xff\xff\xff\xff")


def test_what_is_too_large_for_a_message_goes_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 200)
    commands = [Submit(f"r{i}", [1] * (20 if i != 7 else 300), {}, True) for i in range(20)]
    left_out: list[tuple[str, int]] = []
    data = frames(commands, Commands, lambda command, size: left_out.append((command.request_id, size)))
    bodies = FrameBuffer().feed(b"".join(data))
    assert 2 < len(bodies) < 20 and max(map(len, bodies)) <= 200
    arrived = [command for body in bodies for command in decode_for_engine(body).commands]
    assert arrived == [*commands[:7], *commands[8:]]
    [(request_id, size)] = left_out
    assert request_id == "r7" and size > 300
    assert frames([], Commands, pytest.fail) == [frame(Commands([]))]


@pytest.mark.parametrize("body", [b"", b"\x80\x04K\x01.", b"\xc1", frame(REPORT)[4:], b"\x81\xa4type\xa5Other"])
def test_what_is_no_command_is_refused(body: bytes) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        decode_for_engine(body)


def test_a_field_of_the_wrong_type_is_refused() -> None:
    data = frame(Commands([Abort("b")]))[4:].replace(b"\xa1b", b"\x07")
    with pytest.raises(EngineError, match="Expected `str`, got `int`"):
        decode_for_engine(data)
