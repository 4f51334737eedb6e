"""Random JSON schemas as applications send them: objects of fields, lists, enumerations, numbers in a range."""

import random
from collections.abc import Callable
from typing import Any

_PATTERNS = ["^[a-z]{1,8}$", "^[A-Z]{2}-[0-9]{3}$", "^(red|green|blue)$", "^\\d{4}$", "^[^@ ]{1,6}@[^@ ]{1,6}$"]
_WORDS = ["yes", "no", "a/b", 'quo"te', "back\\slash", "caf\u00e9", "\u4e2d\u6587", "\U0001f600", "", " ", "new\nline"]


def random_schema(seed: int, depth: int = 3) -> dict[str, Any]:
    """A schema; the same seed gives the same. Its answers end: what has no end of its own is left out."""
    draw = random.Random(seed)
    schema = _any(draw, depth)
    if draw.random() < 0.2:
        schema = {"$defs": {"inner": _any(draw, 1)}, "type": "array", "items": {"$ref": "#/$defs/inner"}, "maxItems": 3}
    return {"title": f"schema {seed}", "description": "made at random", **schema}


def _any(draw: random.Random, depth: int) -> dict[str, Any]:
    leaves: list[Callable] = [_string, _integer, _number, _enumeration, _constant, _boolean]
    inner: list[Callable] = [_object, _object, _array, _tuple, _union]
    return draw.choice(leaves + inner * 2 if depth else leaves)(draw, depth)


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = [f"{draw.choice(_WORDS)}{i}" for i in range(draw.randint(0, 5))]
    if not names:
        free = {"patternProperties": {"^[a-z]{1,5}$": _any(draw, 0)}, "maxProperties": draw.randint(0, 3)}
        return {"type": "object", **free, "additionalProperties": False}
    fields = {name: _any(draw, depth - 1) for name in names}
    required = [name for name in names if draw.random() < 0.6]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 2)
    return {"type": "array", "items": _any(draw, depth - 1), "minItems": least, "maxItems": least + draw.randint(0, 3)}


def _tuple(draw: random.Random, depth: int) -> dict[str, Any]:
    items = [_any(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _union(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(draw, depth - 1), {"type": "null"}]}


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    if draw.random() < 0.4:
        return {"type": "string", "pattern": draw.choice(_PATTERNS)}
    if draw.random() < 0.2:
        return {"type": "string", "format": draw.choice(["date", "date-time", "uuid", "ipv4"])}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 20)}


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 10_000)}


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(-100, 100)
    return {"type": "number", "exclusiveMinimum": least, "maximum": least + 1 + draw.randint(0, 50) / 4}


def _enumeration(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": draw.sample([*_WORDS, 1, 2.5, None, True, [1, "x"], {"k": []}], draw.randint(1, 5))}


def _constant(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"const": draw.choice([*_WORDS, 7, False, None])}


def _boolean(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"type": ["boolean", "null"] if draw.random() < 0.3 else "boolean"}
