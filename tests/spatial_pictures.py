"""Spatial questions with a known difficulty: a red and a green shape, and where one is from the other.

The answer is yes as often as no for each relation and distance, so nothing can be had without the picture. Difficulty
is how far apart the shapes are along the axis asked for: near is less than one cell of a 4 x 4 grid of features.

From such questions alone a small model learns nothing: a yes hangs on both places and the relation at once, and each of
them alone is noise. So every picture also has lessons: where each shape is, and all relations of the two.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 64
COLOURS = {"red": "#dc1e1e", "green": "#1ec81e"}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
DISTANCES = {"near": (5, 11), "middle": (14, 22), "far": (26, 42)}
"""Pixels between the centres along the axis asked for, out of SIDE."""
LINES = ("first", "second", "third", "fourth")
"""Columns from the left, rows from the top."""
WORDS = ["is", "the", "of", "?", "yes", "no", *RELATIONS, *COLOURS, "shape", "which", "four", "columns", "rows", "in"]
WORDS += LINES


@dataclass(frozen=True)
class Spatial:
    """One picture with one question: "is the red shape left of the green shape ?"."""

    picture: Image.Image
    question: list[str]
    answer: str
    distance: str
    centres: dict[str, tuple[int, int]]
    """Of the shapes, (x, y), by colour."""

    def lessons(self) -> tuple[list["Lesson"], list["Lesson"]]:
        """Column and row of each shape (four lessons), and each relation of the two in either order (eight)."""
        places, relations = [], []
        for colour, other in (tuple(COLOURS), tuple(COLOURS)[::-1]):
            here, there = self.centres[colour], self.centres[other]
            for axis, lines in enumerate(("columns", "rows")):
                asked = f"which of the four {lines} is the {colour} shape in".split()
                places.append((asked, LINES[here[axis] * len(LINES) // SIDE]))
            for relation, (axis, sign) in RELATIONS.items():
                answer = "yes" if (here[axis] - there[axis]) * sign > 0 else "no"
                relations.append((_asked(colour, relation, other), answer))
        return places, relations


Lesson = tuple[list[str], str]
"""A question, as many words as any other, and its answer."""


def draw_questions(count: int, seed: int) -> list[Spatial]:
    """Seeded questions, a picture each: relations, distances and answers in turn, in a shuffled order."""
    rng, made = random.Random(seed), []
    kinds = [(r, d, a) for r in RELATIONS for d in DISTANCES for a in ("yes", "no")]
    for number in range(count):
        made.append(_draw(*kinds[number % len(kinds)], rng))
    rng.shuffle(made)
    return made


def _draw(relation: str, distance: str, answer: str, rng: random.Random) -> Spatial:
    axis, sign = RELATIONS[relation]
    gap = rng.randint(*DISTANCES[distance]) * (sign if answer == "yes" else -sign)
    radius = rng.randint(4, 6)
    first, second = [0, 0], [0, 0]
    low, high = radius, SIDE - 1 - radius
    second[axis] = rng.randint(max(low, low - gap), min(high, high - gap))
    first[axis] = second[axis] + gap
    other = 1 - axis  # apart enough there that the shapes do not cover each other, on either side
    apart = rng.randint(2 * radius + 1, 26) * rng.choice((-1, 1))
    second[other] = rng.randint(max(low, low - apart), min(high, high - apart))
    first[other] = second[other] + apart
    colour, colour2 = rng.sample([*COLOURS], 2)
    shade = rng.randint(225, 255)
    picture = Image.new("RGB", (SIDE, SIDE), (shade, rng.randint(225, 255), rng.randint(225, 255)))
    canvas = ImageDraw.Draw(picture)
    _shape(canvas, rng.choice(SHAPES), COLOURS[colour2], second, radius)
    _shape(canvas, rng.choice(SHAPES), COLOURS[colour], first, radius)
    centres = {colour: (first[0], first[1]), colour2: (second[0], second[1])}
    return Spatial(picture, _asked(colour, relation, colour2), answer, distance, centres)


def _asked(colour: str, relation: str, other: str) -> list[str]:
    return f"is the {colour} shape {relation} of the {other} shape ?".split()


def _shape(canvas: ImageDraw.ImageDraw, shape: str, colour: str, centre: list[int], radius: int) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
