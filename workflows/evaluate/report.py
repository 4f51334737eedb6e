"""An evaluation as one HTML file that needs nothing else, and its figures as PNG files.

    write_report(folder_of_the_evaluation, out_folder, {"version": "shapes/3"})

Everything from the data and the model is escaped by the template engine, and the page's own policy forbids scripts and
any address but what is embedded: questions and answers are anybody's text. The page is in templates/report.html.
"""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mlmamba.images import WIDEST, open_image
from pipelines.storage import write_atomic
from workflows.evaluate import plots
from workflows.evaluate.benchmarks import benchmark_class
from workflows.evaluate.benchmarks.base import normalise
from workflows.evaluate.intervals import Intervals, calibration_of, find_intervals
from workflows.evaluate.plots import Bar
from workflows.evaluate.results import MARGIN, OVERALL, SCORES, Answered, read_answers, read_image, read_scores
from workflows.evaluate.statistics import Interval

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
        few=FEW_IMAGES,
        answers=answer_rows(rows),
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
    images = len({(row.source, row.image) for row in rows if row.image is not None})
    made = datetime.fromtimestamp((folder / SCORES).stat().st_mtime, UTC)
    return {
        "model": str(scores["model"]),
        **facts,
        "benchmark": str(scores["benchmark"]),
        "questions": f"{len(rows):,} about {images:,} images",
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


OTHER = "(other)"
_MOST_BARS, _MOST_ANSWERS, _MOST_CLASSES = 25, 10, 30
FEW_IMAGES = 30


@dataclass(frozen=True)
class ScoreRow:
    """One line of the table of scores. `items` is None for what is no type of question."""

    name: str
    items: int | None
    interval: Interval
    blind: float | None
    margin: Interval | None
    majority: float | None


def score_rows(scores: dict, intervals: Intervals) -> tuple[list[ScoreRow], list[ScoreRow], list[ScoreRow]]:
    """Lines of the tables: overall and the types, the protocol's other scores, and these by type (f1/popular)."""
    kinds, others, others_by_kind = [], [], []
    for name, value in scores["scores"].items():
        if name == MARGIN:
            continue
        row = ScoreRow(
            name,
            scores["questions"].get(name),
            intervals.scores.get(name, Interval(value, float("nan"), float("nan"), 0)),
            scores.get("blind", {}).get(name),
            intervals.margins.get(name),
            scores.get("majority", {}).get(name),
        )
        of_kind = any(name.endswith(f"/{kind}") for kind in scores["questions"] if kind != OVERALL)
        (kinds if row.items is not None else others_by_kind if of_kind else others).append(row)
    first = [row for row in kinds if row.name == OVERALL]
    # A type that all questions are of is "overall" once more.
    rest = [row for row in kinds if row.name != OVERALL and row.items < scores["questions"][OVERALL]]
    return first + sorted(rest, key=lambda row: -row.items), others, others_by_kind


def bars(rows: Sequence[ScoreRow]) -> list[Bar]:
    """The lines of the figure: as the table's, at most `_MOST_BARS`."""
    return [Bar(row.name, row.interval, row.blind, row.majority) for row in rows[:_MOST_BARS]]


def confusion(rows: Sequence[Answered]) -> tuple[np.ndarray, list[str], list[str]] | None:
    """Counts (references, answers) of the most frequent references; what else was said is under `OTHER`.

    None where the references hardly repeat, as in captions: a table of single answers says nothing.
    """
    pairs = [(normalise(row.answer), normalise(row.prediction)) for row in rows]
    frequent = [
        answer for answer, times in Counter(right for right, _ in pairs).most_common(_MOST_ANSWERS) if times > 1
    ]
    if len(frequent) < 2:
        return None
    place = {answer: i for i, answer in enumerate(frequent)}
    counts = np.zeros((len(frequent), len(frequent) + 1), dtype=int)
    for right, said in pairs:
        if right in place:
            counts[place[right], place.get(said, len(frequent))] += 1
    columns = [*frequent, OTHER]
    return (counts, frequent, columns) if counts[:, -1].any() else (counts[:, :-1], frequent, frequent)


@dataclass(frozen=True)
class AnswerRow:
    """How the questions with one reference answer went. `precision`: of those that said it, the share where it is the
    reference; None where none did. `blind` is the recall with another image."""

    answer: str
    items: int
    recall: float
    precision: float | None
    blind: float | None


def answer_rows(rows: Sequence[Answered]) -> list[AnswerRow]:
    """The most frequent reference answers, each with its recall: a mean over all hides the rare ones. Empty where the
    references hardly repeat."""
    right = [normalise(row.answer) for row in rows]
    said = [normalise(row.prediction) for row in rows]
    blind = [None if row.blind_prediction is None else normalise(row.blind_prediction) for row in rows]
    names = {key: row.answer for key, row in zip(right, rows, strict=True)}
    frequent = [(key, times) for key, times in Counter(right).most_common(_MOST_CLASSES) if times > 1]
    if len(frequent) < 2:
        return []
    hits = Counter(key for key, other in zip(right, said, strict=True) if key == other)
    alone = Counter(key for key, other in zip(right, blind, strict=True) if key == other)
    given, known = Counter(said), all(other is not None for other in blind)
    return [
        AnswerRow(
            names[key],
            times,
            hits[key] / times,
            hits[key] / given[key] if given[key] else None,
            alone[key] / times if known else None,
        )
        for key, times in frequent
    ]


def answer_facts(rows: Sequence[Answered]) -> dict[str, str]:
    """What is odd about the answers, and how long they are and took, in words."""
    seconds = np.array([row.seconds for row in rows])
    tokens = np.array([row.answer_tokens for row in rows])
    facts = {
        "empty answers": f"{sum(not row.prediction.strip() for row in rows):,}",
        "answers cut off at the longest length": f"{sum(row.cut for row in rows):,}",
        "tokens of an answer": f"{np.median(tokens):,.0f} in the median, {tokens.max():,} at most",
    }
    if seconds.any():
        p50, p95 = np.quantile(seconds, [0.5, 0.95])
        facts["time for one question"] = f"{_time(p50)} in the median, {_time(p95)} at the 95th percentile"
    return facts


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


_SIDE, _QUALITY = 224, 80  # longer side in pixels, and quality, of a small image
_LONGEST = 400  # characters of a text that are shown


@dataclass(frozen=True)
class Example:
    """One answer as the report shows it. `image` is a data URI, or None with the reason in `no_image`."""

    id: str
    type: str
    question: str
    answers: str
    prediction: str
    blind_prediction: str | None
    score: float
    p_yes: float | None
    image: str | None
    no_image: str


def worst(rows: Sequence[Answered], count: int) -> list[Answered]:
    """Wrong answers, the surest first where a probability says so; types in turn, each image once."""
    wrong = [row for row in rows if row.score < 0.5]
    return _spread(sorted(wrong, key=lambda row: (row.score, -_sureness(row), _shuffled(row))), count)


def best(rows: Sequence[Answered], count: int) -> list[Answered]:
    """Right answers that were wrong with another image, so that the image was needed; types in turn."""
    right = [row for row in rows if row.score >= 0.5]
    return _spread(sorted(right, key=lambda row: (-row.score, row.blind_score or 0.0, _shuffled(row))), count)


def example(scores: dict, row: Answered) -> Example:
    """A row as the report shows it: long texts cut, the image small."""
    image, reason = small_image(scores, row)
    return Example(
        id=cut(row.id),
        type=row.type,
        question=cut(row.question),
        answers=cut(", ".join(dict.fromkeys(row.answers or [row.answer]))),
        prediction=cut(row.prediction),
        blind_prediction=None if row.blind_prediction is None else cut(row.blind_prediction),
        score=row.score,
        p_yes=row.p_yes,
        image=image,
        no_image=reason,
    )


def small_image(scores: dict, row: Answered) -> tuple[str | None, str]:
    """The row's image as a data URI, or None and why not. A report is made even where images are gone."""
    try:
        data = read_image(scores, row)
        if data is None:
            return None, "text only"
        image = open_image(data, WIDEST)
    except Exception as error:  # whatever a store or a decoder raises: it is told, in the image's place
        return None, f"the image cannot be read: {cut(str(error), 120)}"
    scale = min(1.0, _SIDE / max(image.size)) if min(image.size) > 64 else 128 / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), ""


def cut(text: str, longest: int = _LONGEST) -> str:
    """Text of at most so many characters; what is cut off is said."""
    return text if len(text) <= longest else f"{text[:longest]} ... ({len(text):,} characters)"


def _sureness(row: Answered) -> float:
    return 0.0 if row.p_yes is None else abs(row.p_yes - 0.5)


def _shuffled(row: Answered) -> str:
    """An order that has nothing to do with the file's, and is always the same."""
    return hashlib.sha256(row.id.encode()).hexdigest()


def _spread(ordered: Sequence[Answered], count: int) -> list[Answered]:
    """The first of each type, then the second of each, and so on; no image twice."""
    by_type: dict[str, list[Answered]] = {}
    for row in ordered:
        by_type.setdefault(row.type, []).append(row)
    queues, chosen, seen = list(by_type.values()), [], set()
    while len(chosen) < count and any(queues):
        for queue in queues:
            while queue and queue[0].image is not None and (queue[0].source, queue[0].image) in seen:
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
                seen.add((chosen[-1].source, chosen[-1].image))
    return chosen
