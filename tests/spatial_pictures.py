"""Spatial questions with a known difficulty: two coloured shapes, and where one is from the other.

The answer is yes as often as no for each relation and distance, so nothing can be had without the picture. Difficulty
is how far apart the shapes are along the axis asked for: near is less than one cell of a 4 x 4 grid of features.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 64
COLOURS = {"red": "#dc1e1e", "green": "#1ec81e", "blue": "#1e1edc", "yellow": "#e6d21e", "black": "#141414"}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
DISTANCES = {"near": (5, 11), "middle": (14, 22), "far": (26, 42)}
"""Pixels between the centres along the axis asked for, out of SIDE."""
WORDS = ["is", "the", "of", "?", "yes", "no", *RELATIONS, *COLOURS, *SHAPES]


@dataclass(frozen=True)
class Spatial:
    """One picture with one question: "is the red circle left of the blue square ?"."""

    picture: Image.Image
    question: list[str]
    answer: str
    distance: str


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
    (colour, shape), (colour2, shape2) = rng.sample([(c, s) for c in COLOURS for s in SHAPES], 2)
    shade = rng.randint(225, 255)
    picture = Image.new("RGB", (SIDE, SIDE), (shade, rng.randint(225, 255), rng.randint(225, 255)))
    canvas = ImageDraw.Draw(picture)
    _shape(canvas, shape2, COLOURS[colour2], second, radius)
    _shape(canvas, shape, COLOURS[colour], first, radius)
    question = ["is", "the", colour, shape, relation, "of", "the", colour2, shape2, "?"]
    return Spatial(picture, question, answer, distance)


def _shape(canvas: ImageDraw.ImageDraw, shape: str, colour: str, centre: list[int], radius: int) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
