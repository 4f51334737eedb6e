"""Evaluation folders as an evaluation leaves them, without a model: for tests of what reads them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from workflows.evaluate.results import Answered, columns, measure, write_answers, write_scores

HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)> $\\frac{ "quoted" & \u4f60\u597d \x07'


def write_evaluation(folder: Path, rows: list[Answered], benchmark: str, **changes) -> dict:
    """answers.jsonl, scores.json and an image for every row that has one. Returns the scores."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number, name in enumerate(sorted({row.image for row in rows if row.image})):
        shade = np.full((48, 64, 3), (number * 37) % 255, dtype=np.uint8)
        Image.fromarray(shade).save(images / name)
    blind = all(row.blind_score is not None for row in rows)
    scores = {
        "benchmark": benchmark,
        "model": "tiny/1",
        "scores": measure(benchmark, columns(rows)),
        "blind": measure(benchmark, columns(rows, blind=True)) if blind else {},
        "majority": {"overall": 0.25},
        "majority_answer": "red",
        "questions": {"overall": len(rows)}
        | {kind: sum(r.type == kind for r in rows) for kind in {r.type for r in rows}},
        "complete": True,
        "missing": {"count": 0, "ids": [], "reasons": {}},
        "notes": [],
        "images": [{"kind": "folder", "uri": str(images)}],
        "data_digest": "abc123",
    } | changes
    write_answers(folder, rows)
    write_scores(folder, scores)
    return scores


def vqa_rows(seed: int = 0, images: int = 60, right: float = 0.8, blind: float = 0.4) -> list[Answered]:
    """Questions of two types about images, some of which are hard for a model whatever is asked."""
    rng, rows = np.random.default_rng(seed), []
    hard = np.random.default_rng(99).random(images) < 0.25
    for image in range(images):
        for k, kind in enumerate(("colour", "shape", "colour")):
            score = float(rng.random() < (right - 0.6 * hard[image]))
            answer = ("red", "green")[image % 2] if kind == "colour" else "circle"
            rows.append(
                Answered(
                    id=f"{image}/{k}",
                    question=f"what {kind}?",
                    answer=answer,
                    answers=[answer],
                    type=kind,
                    prediction=answer if score else "blue",
                    score=score,
                    image=f"{image}.png",
                    blind_prediction="blue",
                    blind_score=float(rng.random() < blind),
                    prompt_tokens=20 + k,
                    answer_tokens=2 + k % 2,
                    seconds=0.01 * (1 + k),
                )
            )
    return rows


def pope_rows(seed: int = 0, images: int = 30) -> list[Answered]:
    """Yes/No questions of POPE's three splits with probabilities, not asked blind."""
    rng, rows = np.random.default_rng(seed), []
    for split in ("random", "popular", "adversarial"):
        for image in range(images):
            positive = int(rng.random() < 0.5)
            p_yes = float(np.clip(positive * 0.5 + 0.25 + rng.normal(0, 0.3), 0, 1))
            said = float(p_yes >= 0.5)
            rows.append(
                Answered(
                    id=f"{split}/{image}",
                    question="is there a cat?",
                    answer="yes" if positive else "no",
                    answers=["yes" if positive else "no"],
                    type=split,
                    prediction="Yes" if said else "No",
                    score=float(said == positive),
                    text_score=float(said == positive),
                    text_yes=said,
                    p_yes=p_yes,
                    image=f"{image}.png",
                    details={"positive": positive},
                )
            )
    return rows


def hostile(row: Answered) -> Answered:
    """The row with text that would break a careless page in every field that is anybody's."""
    return replace(
        row,
        id=f"{row.id}{HOSTILE}",
        question=HOSTILE,
        answer=HOSTILE,
        answers=[HOSTILE],
        type=HOSTILE,
        prediction=HOSTILE * 200,
        blind_prediction=HOSTILE,
    )
