"""The report's examples: which answers to show, and their pictures as small JPEGs."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mlmamba.pictures import open_picture
from workflows.evaluate.results import Answered, read_picture

_SIDE, _QUALITY = 224, 80  # longer side in pixels, and quality, of a small picture
_LONGEST = 400  # characters of a text that are shown


@dataclass(frozen=True)
class Example:
    """One answer as the report shows it. `picture` is a data URI, or None with the reason in `no_picture`."""

    id: str
    type: str
    question: str
    answers: str
    prediction: str
    blind_prediction: str | None
    score: float
    p_yes: float | None
    picture: str | None
    no_picture: str


def worst(rows: Sequence[Answered], count: int) -> list[Answered]:
    """Wrong answers, the surest first where a probability says so; types in turn, each picture once."""
    wrong = [row for row in rows if row.score < 0.5]
    return _spread(sorted(wrong, key=lambda row: (row.score, -_sureness(row), _shuffled(row))), count)


def best(rows: Sequence[Answered], count: int) -> list[Answered]:
    """Right answers that were wrong with another picture, so that the picture was needed; types in turn."""
    right = [row for row in rows if row.score >= 0.5]
    return _spread(sorted(right, key=lambda row: (-row.score, row.blind_score or 0.0, _shuffled(row))), count)


def example(scores: dict, row: Answered) -> Example:
    """A row as the report shows it: long texts cut, the picture small."""
    picture, reason = small_picture(scores, row)
    return Example(
        id=cut(row.id),
        type=row.type,
        question=cut(row.question),
        answers=cut(", ".join(dict.fromkeys(row.answers or [row.answer]))),
        prediction=cut(row.prediction),
        blind_prediction=None if row.blind_prediction is None else cut(row.blind_prediction),
        score=row.score,
        p_yes=row.p_yes,
        picture=picture,
        no_picture=reason,
    )


def small_picture(scores: dict, row: Answered) -> tuple[str | None, str]:
    """The row's picture as a data URI, or None and why not. A report is made even where pictures are gone."""
    try:
        data = read_picture(scores, row)
        if data is None:
            return None, "text only"
        picture = open_picture(data)
    except Exception as error:  # whatever a store or a decoder raises: it is told, in the picture's place
        return None, f"the picture cannot be read: {cut(str(error), 120)}"
    scale = min(1.0, _SIDE / max(picture.size)) if min(picture.size) > 64 else 128 / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    buffer = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=_QUALITY)
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
    """The first of each type, then the second of each, and so on; no picture twice."""
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
