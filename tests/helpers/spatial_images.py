"""Spatial questions with a known difficulty: a red and a green shape, and where one is from the other.

"left or right of the other shape : where is the red": each side is the answer as often as the other for each axis and
distance, so nothing can be had without the image. Difficulty is how far apart the shapes are along the axis asked
for: near is less than one cell of a 4 x 4 grid of features.

The colour is the last word, so a model need not carry it from one word to the next before it looks at the image.

From such questions alone a small model learns little, because the answer hangs on both places at once. So every
image also has lessons: where each shape is, and where each is from the other along both axes.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 64
COLOURS = {"red": "#dc1e1e", "green": "#1ec81e"}
SHAPES = ("circle", "square", "triangle")
SIDES = (("left", "right"), ("above", "below"))
"""By axis, x and y: where the smaller coordinate is, and the larger."""
DISTANCES = {"near": (5, 11), "middle": (14, 22), "far": (26, 42)}
"""Pixels between the centres along the axis asked for, out of SIDE."""
LINES = ("first", "second", "third", "fourth")
"""Columns from the left, rows from the top."""
WORDS = ["left", "or", "right", "above", "below", "of", "the", "other", "shape", ":", "where", "is", *COLOURS]
WORDS += ["to", "four", "columns", "rows", *LINES]


@dataclass(frozen=True)
class Spatial:
    """One image with one question and its answer."""

    image: Image.Image
    question: list[str]
    answer: str
    distance: str
    centres: dict[str, tuple[int, int]]
    """Of the shapes, (x, y), by colour."""

    def lessons(self) -> tuple[list["Lesson"], list["Lesson"]]:
        """Column and row of each shape (four lessons), and where each is from the other along both axes (four)."""
        places, relations = [], []
        for colour, other in (tuple(COLOURS), tuple(COLOURS)[::-1]):
            for axis, lines in enumerate(("columns", "rows")):
                here, there = self.centres[colour][axis], self.centres[other][axis]
                asked = f"first to fourth of the four {lines} : where is the {colour}".split()
                places.append((asked, LINES[here * len(LINES) // SIDE]))
                relations.append((_asked(axis, colour), SIDES[axis][here > there]))
        return places, relations


Lesson = tuple[list[str], str]
"""A question, as many words as any other, and its answer."""


def draw_questions(count: int, seed: int) -> list[Spatial]:
    """Seeded questions, an image each: axes, distances and answers in turn, in a shuffled order."""
    rng, made = random.Random(seed), []
    kinds = [(axis, distance, side) for axis in (0, 1) for distance in DISTANCES for side in (0, 1)]
    for number in range(count):
        made.append(_draw(*kinds[number % len(kinds)], rng))
    rng.shuffle(made)
    return made


def _draw(axis: int, distance: str, side: int, rng: random.Random) -> Spatial:
    gap = rng.randint(*DISTANCES[distance]) * (-1, 1)[side]
    radius = rng.randint(4, 6)
    first, second = [0, 0], [0, 0]
    low, high = radius, SIDE - 1 - radius
    second[axis] = rng.randint(max(low, low - gap), min(high, high - gap))
    first[axis] = second[axis] + gap
    across = 1 - axis  # apart enough there that the shapes do not cover each other, on either side
    apart = rng.randint(2 * radius + 1, 26) * rng.choice((-1, 1))
    second[across] = rng.randint(max(low, low - apart), min(high, high - apart))
    first[across] = second[across] + apart
    colour, other = rng.sample([*COLOURS], 2)
    shade = rng.randint(225, 255)
    image = Image.new("RGB", (SIDE, SIDE), (shade, rng.randint(225, 255), rng.randint(225, 255)))
    canvas = ImageDraw.Draw(image)
    _shape(canvas, rng.choice(SHAPES), COLOURS[other], second, radius)
    _shape(canvas, rng.choice(SHAPES), COLOURS[colour], first, radius)
    centres = {colour: (first[0], first[1]), other: (second[0], second[1])}
    return Spatial(image, _asked(axis, colour), SIDES[axis][side], distance, centres)


def _asked(axis: int, colour: str) -> list[str]:
    near, far = SIDES[axis]
    return f"{near} or {far} of the other shape : where is the {colour}".split()


def _shape(canvas: ImageDraw.ImageDraw, shape: str, colour: str, centre: list[int], radius: int) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
