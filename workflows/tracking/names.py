"""Names that MLflow takes, made of any text and read back.

MLflow refuses a metric's or parameter's name with other characters than letters and digits of any script, "_", "-",
".", ":", " " and "/", one that would be another name as a path ("", "a//b", "./a", "..a", "a/"), and one of over 250
characters. Names made of a user's words ("what is it?", "Farbe (rot)") hold such characters. So each of them becomes
`_xHEX_`, its code point in hexadecimal capitals, as in Office Open XML: "what is it?" is "what is it_x3F_". A "_" of
the text that begins such a sequence becomes `_x5F_` itself, so that two texts never have the same name, and
`text_of` gives the text of a name. The name of no text at all is `_x00_`. A name that would be too long is cut and ends
in a digest of the whole: it is the only kind that cannot be read back.
"""

import hashlib
import re
from collections.abc import Mapping

from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH

_REFUSED = re.compile(r"[^/\w.\- :]")
_LIKE_OURS = re.compile(r"_(?=x[0-9A-F])")
_EMPTY_SEGMENT = re.compile(r"(?<=/)/|^/|/$")
_DOTS = re.compile(r"(?:(?<=/)|^)\.{1,2}(?=/|$)|^\.\.")
_OURS = re.compile(r"_x([0-9A-F]+)_")
_EMPTY = "_x00_"  # a code point is written without zeros before it, so this one is free
_DIGEST = 16


def metric_name(text: str) -> str:
    """The name of a metric or parameter for a text; most texts are their own name (see the top of this file)."""
    name = _LIKE_OURS.sub(_escaped, text)
    for refused in (_REFUSED, _EMPTY_SEGMENT, _DOTS):
        name = refused.sub(_escaped, name)
    if len(name) > MAX_ENTITY_KEY_LENGTH:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
        name = f"{name[: MAX_ENTITY_KEY_LENGTH - _DIGEST - 1]}_{digest}"
    return name or _EMPTY


def metric_names(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers by the names that MLflow takes for them."""
    return {metric_name(text): value for text, value in numbers.items()}


def text_of(name: str) -> str:
    """The text that a name was made of; of a name that was cut, what is left of it and the digest."""
    return "" if name == _EMPTY else _OURS.sub(lambda found: chr(int(found[1], 16)), name)


def _escaped(found: re.Match) -> str:
    return "".join(f"_x{ord(character):X}_" for character in found[0])
