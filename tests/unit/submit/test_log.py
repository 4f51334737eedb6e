"""What the client makes of a job's log: its lines, its result, and nothing that somebody wrote into it."""

import json

import pytest

from workflows.submit.log import MARK, RESULT, Reader, for_terminal, result_prefix

RAYS = "2026-11-21 12:00:00,123\tINFO job_manager.py:568 -- Runtime env is setting up."
JOB = {MARK: "1f2e"}


def read(*lines: str, marks=JOB) -> tuple[list[str], dict | None]:
    shown = []
    reader = Reader(shown.append, marks)
    reader.feed("Running entrypoint for job x: python\n" + "\n".join(lines))
    reader.close()
    return shown, reader.result


def test_a_log_in_pieces_gives_the_jobs_lines_and_its_result():
    log = f"{RAYS}\nRunning entrypoint for job x: python\n== train\n{RESULT}1f2e " + '{"model": 1}\nlast'
    lines = []
    for size in (1, 7, 1000):
        lines.clear()
        reader = Reader(lines.append, JOB)
        for i in range(0, len(log), size):
            reader.feed(log[i : i + size])
        reader.close()
        assert lines == ["== train", "last"]
        assert reader.result == {"model": 1}


def test_what_a_quick_job_says_before_rays_line_about_its_start_is_shown():
    """Ray writes that line into a buffer, starts the job's process, and flushes then."""
    lines = []
    reader = Reader(lines.append, JOB)
    reader.feed(f"{RAYS}\nsh: 1: exec: python-nowhere: not found\n")
    assert lines == []  # more of Ray's may come
    reader.feed("Running entrypoint for job x: exec python-nowhere _job/start.py run\n")
    assert lines == ["sh: 1: exec: python-nowhere: not found"]
    reader.close()
    assert lines == ["sh: 1: exec: python-nowhere: not found"]


def test_of_a_job_that_never_started_the_log_is_shown_at_its_end():
    lines = []
    reader = Reader(lines.append, JOB)
    reader.feed(f"{RAYS}\nno space left")
    reader.close()
    assert lines == ["no space left"]


@pytest.mark.parametrize(
    "line",
    [
        RESULT + '{"model": "forged"}',
        RESULT + 'guess {"model": "forged"}',
        "answer\r" + RESULT + '1f2e {"model": "forged"}',
        " " + RESULT + '1f2e {"model": "forged"}',
    ],
)
def test_a_line_that_looks_like_a_result_is_shown_and_not_believed(line):
    shown, result = read(line, result_prefix(JOB) + '{"model": 1}', line)
    assert result == {"model": 1}
    assert len(shown) == 2
    assert "forged" in shown[0]
    assert read(line)[1] is None


@pytest.mark.parametrize("text", ["5", "null", "[1]", '"x"', "{", "", "[" * 100_000, '{"a": 1} x'])
def test_a_result_of_another_shape_is_a_line_like_any_other(text):
    shown, result = read(result_prefix(JOB) + text)
    assert result is None
    assert len(shown) == 1


def test_the_result_of_an_earlier_clients_job_is_read():
    assert read(RESULT + json.dumps({"model": 1}), marks={}) == ([], {"model": 1})


def test_a_second_line_about_a_start_is_the_jobs_own():
    assert read("Running entrypoint for job y: rm") == (["Running entrypoint for job y: rm"], None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("\x1b[36m(Worker pid=7)\x1b[0m loss 1", "(Worker pid=7) loss 1"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\rb", r"a\rb"),
        ("loss 1\r", "loss 1"),
        ("\x9b31m\x08\u202e", r"\x9b31m\x08\u202e"),
        ("a\tb", "a    b"),
        ("größer 図", "größer 図"),
    ],
)
def test_a_log_moves_no_cursor_and_sets_no_title(line, expected):
    assert for_terminal(line) == expected
    assert read(line)[0] == [expected]
