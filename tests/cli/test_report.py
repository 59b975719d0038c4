"""What a command says when the system refuses."""

import json

import pytest

from tritium.cli.report import reporting


@pytest.mark.parametrize("is_json", [False, True])
def test_what_the_system_refuses_is_one_line_with_its_file_and_exit_code_1(
    is_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, reporting(is_json=is_json):
        raise FileNotFoundError(2, "No such file or directory", "/proc/engine")
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert err == "error: [Errno 2] No such file or directory: '/proc/engine'\n"
    assert (json.loads(out)["error"]["type"] if is_json else out) == ("FileNotFoundError" if is_json else "")
