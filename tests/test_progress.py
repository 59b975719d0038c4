"""The progress bar shows itself to people only, and counts."""

from tritium.progress import progress_bar


def test_nothing_is_shown_when_standard_error_is_no_terminal(capsys):
    with progress_bar(3, None) as bar:
        bar.finish_one(10)
    assert capsys.readouterr() == ("", "")


def test_a_bar_that_was_asked_for_counts_requests_and_tokens(capsys):
    with progress_bar(2, True) as bar:
        bar.finish_one(10)
        bar.finish_one(10)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err
    assert "tokens/s" in err
