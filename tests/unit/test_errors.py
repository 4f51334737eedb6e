"""Messages for a person: one mark at the end of a sentence, whatever other messages they are made of."""

import io

import pytest

from workflows.console import Console
from workflows.errors import UsageError, WorkflowError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the server refused.. Run again", "the server refused. Run again"),
        (
            "MLflow: names may only contain slashes (/).. Run again..",
            "MLflow: names may only contain slashes (/). Run again.",
        ),
        ("it is damaged.; and 3 other reasons", "it is damaged; and 3 other reasons"),
        ("see ../data and a.b.. or", "see ../data and a.b. or"),
        ("1, 2, ... and more...", "1, 2, ... and more..."),
        ("wait ...; then", "wait ...; then"),
        ("two.\n   three..\nfour", "two.\n   three.\nfour"),
    ],
)
def test_a_message_has_one_full_stop(text, shown):
    stream = io.StringIO()
    Console(stream).note(text)
    assert stream.getvalue() == f"   {shown}\n"
    for kind in (UsageError, WorkflowError):
        assert str(kind(text)) == shown
