"""An evaluation as one HTML file that needs nothing else, and its figures as PNG files.

    from workflows.evaluate.report import write_report
    write_report(folder_of_the_evaluation, out_folder, {"version": "shapes/3"})

Everything from the data and the model is escaped by the template engine, and the page's own policy forbids scripts and
any address but what is embedded: questions and answers are anybody's text. The page is in templates/report.html.
"""

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from workflows.evaluate import plots
from workflows.evaluate.benchmarks import benchmark_class
from workflows.evaluate.calibration import calibration_of
from workflows.evaluate.intervals import Intervals, find_intervals
from workflows.evaluate.report_examples import best, cut, example, worst
from workflows.evaluate.report_tables import FEW_PICTURES, answer_facts, bars, confusion, score_rows
from workflows.evaluate.results import SCORES, Answered, read_answers, read_scores
from workflows.layout import write_atomic

PAGE = "report.html"
_EXAMPLES = 12


def write_report(
    folder: Path,
    out: Path | None = None,
    facts: Mapping[str, str] | None = None,
    intervals: Intervals | None = None,
) -> list[Path]:
    """Write report.html and its figures.

    Args:
        folder: a finished evaluation (answers.jsonl and scores.json).
        out: where to write; the folder itself by default.
        facts: what else to say about the model in the page's head: version, recipe, data digest, run.
        intervals: of the scores, where they were found before.

    Returns:
        The files written, the page first.

    Raises:
        FileNotFoundError: the evaluation is not finished.
    """
    out = out or folder
    scores, rows = read_scores(folder), read_answers(folder)
    intervals = intervals or find_intervals(scores, rows)
    kinds, others, others_by_kind = score_rows(scores, intervals)
    calibration, table = calibration_of(rows), confusion(rows)
    yes = (benchmark_class(scores["benchmark"]).choices or ("Yes",))[0]
    figures = {"scores": plots.plot_scores(bars(kinds))}
    if table is not None:
        figures["confusion"] = plots.plot_confusion(*table)
    if calibration is not None:
        figures["calibration"] = plots.plot_calibration(calibration, yes)
    if measured := _measured(rows):
        figures["answers"] = plots.plot_histograms(measured)
    page = _template().render(
        scores=scores,
        head=_head(folder, scores, rows, facts or {}),
        kinds=kinds,
        others=others,
        others_by_kind=others_by_kind,
        few=FEW_PICTURES,
        calibration=calibration,
        yes=yes,
        worst=[example(scores, row) for row in worst(rows, _EXAMPLES)],
        best=[example(scores, row) for row in best(rows, _EXAMPLES)],
        blind_was_asked=bool(intervals.blind),
        answer_facts=answer_facts(rows),
        figures={name: _data_uri(data) for name, data in figures.items()},
    )
    files = [out / PAGE]
    for name, data in figures.items():
        files.append(out / f"report-{name}.png")
        write_atomic(files[-1], data)
    write_atomic(files[0], page)
    return files


def _head(folder: Path, scores: dict, rows: list[Answered], facts: Mapping[str, str]) -> dict[str, str]:
    pictures = len({(row.source, row.image) for row in rows if row.image is not None})
    made = datetime.fromtimestamp((folder / SCORES).stat().st_mtime, UTC)
    return {
        "model": str(scores["model"]),
        **facts,
        "benchmark": str(scores["benchmark"]),
        "questions": f"{len(rows):,} about {pictures:,} pictures",
        "evaluated": f"{made:%Y-%m-%d %H:%M} UTC",
    }


def _measured(rows: list[Answered]) -> dict[str, list[float]]:
    """What the histograms show: what is not the same for all."""
    found = {
        "tokens of the answer": [row.answer_tokens for row in rows],
        "tokens of the prompt": [row.prompt_tokens for row in rows],
        "milliseconds per question": [1000 * row.seconds for row in rows],
    }
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda value: "" if value is None else f"{value:.1%}",
        "points": lambda value: "" if value is None else f"{100 * value:.1f}",
        "cut": cut,
    }
    return environment.get_template(PAGE)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
