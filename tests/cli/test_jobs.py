"""The lines of `tritium run --input`: one job or one error each, and no line is done twice."""

import json
from pathlib import Path

import pytest

from tritium.cli.jobs import BadLine, Job, read_done, read_jobs
from tritium.errors import ConfigError
from tritium.sampling_params import SamplingParams


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def test_lines_become_jobs_with_the_commands_options_as_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in",
        {"id": "a", "prompt": "x", "temperature": 0.5},
        b"\n",
        {"prompt": [1, 2]},
        {"id": 7, "messages": [{"role": "user", "content": "hi"}], "stop": ["."]},
    )
    first, second, third = read_jobs(path, {"max_tokens": 3, "temperature": 0.0})
    assert first == Job("a", "x", None, SamplingParams(max_tokens=3, temperature=0.5))
    assert second == Job("3", [1, 2], None, SamplingParams(max_tokens=3, temperature=0.0))
    assert isinstance(third, Job) and third.job_id == "7" and third.params.stop == (".",)
    assert third.messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("line", "job_id", "fragment"),
    [
        (b"{\n", "1", "not JSON"),
        (b"[1]\n", "1", "must be a JSON object, not list"),
        (b"\xff\xfe\n", "1", "not JSON"),
        ({"id": "a"}, "a", "either prompt or messages"),
        ({"id": "a", "prompt": "x", "messages": []}, "a", "either prompt or messages"),
        ({"id": "a", "prompt": 3}, "a", "prompt must be text or a list of token ids, not 3"),
        ({"id": ["a"], "prompt": "x"}, "1", "id must be text or an integer"),
        ({"id": "a", "prompt": "x", "temprature": 1}, "a", "did you mean 'temperature'?"),
        ({"id": "a", "prompt": "x", "top_p": 2}, "a", "top_p"),
    ],
)
def test_a_bad_line_is_one_error_that_says_why(tmp_path: Path, line: object, job_id: str, fragment: str) -> None:
    bad, good = read_jobs(write(tmp_path / "in", line, {"id": "good", "prompt": "x"}), {})
    assert isinstance(bad, BadLine) and isinstance(good, Job)
    assert (bad.job_id, bad.line_number) == (job_id, 1)
    assert fragment in str(bad.error)


def test_a_repeated_id_is_an_error(tmp_path: Path) -> None:
    first, second = read_jobs(write(tmp_path / "in", {"id": 1, "prompt": "x"}, {"id": "1", "prompt": "y"}), {})
    assert isinstance(first, Job) and isinstance(second, BadLine)
    assert "the id '1' was used on an earlier line" in str(second.error)


def test_answered_ids_are_read_and_a_torn_last_line_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path / "out", {"id": "a", "text": ""}, {"id": "b", "text": ""}, b'{"id": "c", "te')
    assert read_done(path) == {"a", "b"}
    assert path.read_bytes().endswith(b"}\n") and len(path.read_text().splitlines()) == 2
    assert read_done(tmp_path / "absent") == set()


def test_records_of_errors_are_removed_for_their_lines_to_be_tried_again(tmp_path: Path) -> None:
    answers = {"id": "a", "text": "error"}, {"id": "c", "text": ""}
    path = write(tmp_path / "out", answers[0], {"id": "b", "text": "half", "error": {}}, answers[1], b'{"id": "d"')
    path.chmod(0o640)
    assert read_done(path) == {"a", "c"}
    assert path.read_bytes() == write(tmp_path / "expected", *answers).read_bytes()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "out"]


def test_a_crash_while_errors_are_removed_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    path = write(tmp_path / "out", {"id": "a", "text": ""}, {"id": "b", "error": {}})
    before = path.read_bytes()
    monkeypatch.setattr("tritium.cli.jobs.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        read_done(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"hello\n", b'{"x": 1}\n', b"[1]\n", b'{"error": 1}\n', b'"an error"\n'])
def test_a_file_that_is_no_output_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(ConfigError, match="is not an output of `tritium run`; name a new file"):
        read_done(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent cannot be read"):
        list(read_jobs(tmp_path / "absent", {}))
