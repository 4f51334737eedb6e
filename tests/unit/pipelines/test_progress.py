"""Progress: what an event says, how it looks on a terminal and in a log file."""

import io

import pytest

from pipelines import progress
from pipelines.progress import Progress, ProgressMeter
from workflows.console import Console, duration


class Clock:
    """Time that only tests move."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class TestMeter:
    def test_rate_and_time_left(self, clock):
        events = []
        meter = ProgressMeter("tokenize", "records", events.append, 1000)
        assert (events[0].done, events[0].per_second, events[0].seconds_left) == (0, 0, None)
        clock.now += 10
        meter.add(200, quarantined=3)
        assert (events[1].per_second, events[1].seconds_left, events[1].quarantined) == (20, 40, 3)
        clock.now += 10
        meter.add(800, quarantined=1)
        assert (events[2].done, events[2].seconds_left, events[2].quarantined, events[2].seconds) == (1000, 0, 4, 20)

    def test_what_was_done_before_does_not_count_as_speed(self, clock):
        events = []
        meter = ProgressMeter("tokenize", "records", events.append, 1000)
        clock.now += 1
        meter.add(500, skipped=500)
        assert events[-1].per_second == 0
        assert events[-1].seconds_left is None
        clock.now += 9
        meter.add(100)
        assert (events[-1].per_second, events[-1].seconds_left, events[-1].skipped) == (10, 40, 500)

    def test_the_rate_is_that_of_the_last_minute(self, clock):
        events = []
        meter = ProgressMeter("tokenize", "records", events.append, 100_000)
        for rate, seconds in ((100, 300), (10, 90)):  # a source of large images follows one of small ones
            for _ in range(seconds):
                clock.now += 1
                meter.add(rate)
        assert events[-1].per_second == pytest.approx(10)

    def test_counting_a_stream_of_unknown_length(self, clock):
        events = []
        assert list(ProgressMeter("records", "records", events.append).count(range(5))) == [0, 1, 2, 3, 4]
        assert (events[-1].done, events[-1].total, events[-1].seconds_left) == (5, None, None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


EVENT = Progress("tokenize", 1000, 12_000, "records", per_second=12.5, quarantined=7, skipped=500, seconds=40)
TEXT = "   tokenize: 1,000/12,000 records, 12/s, 14 min 40 s left, 7 quarantined, 500 done before"
LAST = Progress("tokenize", 12_000, 12_000, "records", per_second=12.5, seconds=4000)


class TestConsole:
    def test_a_terminal_shows_one_line_that_changes(self):
        stream = Terminal()
        console = Console(stream)
        for event in (EVENT, EVENT, LAST):
            console.preparation(event)
        console.preparation(Progress("finished", 10, 10, "rows"))
        clear = "\r\x1b[2K"
        assert (
            stream.getvalue()
            == f"{clear}{TEXT}" * 2 + f"{clear}   tokenize: 12,000/12,000 records, 12/s, in 1 h 06 min\n"
        )

    def test_a_log_file_gets_whole_lines_now_and_then_and_the_last(self):
        stream = io.StringIO()
        console = Console(stream)
        for event in (EVENT, EVENT, EVENT, LAST):
            console.preparation(event)
        assert stream.getvalue().splitlines() == [TEXT, "   tokenize: 12,000/12,000 records, 12/s, in 1 h 06 min"]

    def test_listing_records_is_not_silent(self):
        stream = io.StringIO()
        Console(stream).preparation(Progress("records", 3000, None, "records", per_second=1000))
        assert stream.getvalue() == "   records: 3,000 records, 1,000/s\n"

    def test_what_counts_nothing_is_said(self):
        console = Console(stream := io.StringIO())
        console.preparation(Progress("starting Ray on this machine", 0, None, ""))
        assert stream.getvalue() == "   starting Ray on this machine ...\n"
        assert console.phases == {}

    def test_the_last_event_of_each_phase_is_kept_for_the_summary(self):
        console = Console(io.StringIO())
        console.preparation(EVENT)
        console.preparation(LAST)
        assert console.phases == {"tokenize": LAST.__dict__}

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (750, "12 min 30 s"), (11_100, "3 h 05 min")],
    )
    def test_durations(self, seconds, text):
        assert duration(seconds) == text
