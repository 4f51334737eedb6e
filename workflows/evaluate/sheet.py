"""A PNG of test images with questions, right answers and predictions: the figure to look at before the numbers."""

import os
import random
from pathlib import Path

from matplotlib.figure import Figure

from mlmamba.conversation import clean
from mlmamba.images import open_image
from pipelines.sources import open_source
from pipelines.storage import write_atomic
from workflows.evaluate.benchmarks.base import normalise
from workflows.evaluate.questions import Image
from workflows.recipe.schema import Recipe


def save_example(recipe: Recipe, images: list[Image], folder: Path) -> dict[str, str]:
    """Put one test image into a folder, for a person to ask about. Returns its `image` path and a `question`.

    Args:
        images: the recipe's test sources, as `load_questions` lists them.
    """
    image = _sample(recipe, images, 1)[0]
    data = open_source(recipe.data.test[image.source]).read_image(image.location)
    file = folder / f"example{Path(image.location).suffix}"
    write_atomic(file, data)
    return {"image": str(file), "question": clean(image.questions[0])}


def draw_sheet(
    recipe: Recipe, images: list[Image], predictions: dict[str, str], out: Path, columns: int = 4, rows: int = 3
) -> None:
    """Draw a seeded sample of images, each with up to four questions; wrong answers in red.

    Args:
        images: the recipe's test sources, as `load_questions` lists them.
        predictions: prediction by question id.
        out: PNG file, written beside and renamed.
    """
    chosen = _sample(recipe, images, columns * rows)
    sources = [open_source(config) for config in recipe.data.test]
    figure = Figure(figsize=(3.6 * columns, 3.9 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, chosen, strict=False):
        axis.imshow(open_image(sources[image.source].read_image(image.location)))
        axis.set_title(image.record_id, fontsize=8, color="0.4")
        for line, (question, answer, key) in enumerate(
            list(zip(image.questions, image.answers, image.ids, strict=True))[:4]
        ):
            said = predictions[key]
            right = normalise(said) == normalise(answer)
            verdict = said if right else f"{said or '(nothing)'}  (right: {answer})"
            axis.text(
                0.0,
                -0.06 - 0.085 * line,
                f"{clean(question)} {verdict}",
                transform=axis.transAxes,
                fontsize=7.5,
                va="top",
                color="black" if right else "crimson",
            )
    figure.suptitle(f"{recipe.name}: sample test images, questions and answers (red: wrong)", fontsize=11)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.93, bottom=0.09, hspace=0.55, wspace=0.12)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, out)


def _sample(recipe: Recipe, images: list[Image], count: int) -> list[Image]:
    shown = [image for image in images if image.location is not None]
    return random.Random(recipe.seed).sample(shown, min(count, len(shown)))
