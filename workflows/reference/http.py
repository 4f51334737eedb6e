"""The HTTP interface's page: endpoints and request as workflows/serve states them, errors from where they are raised,
and the options of a service.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from workflows.reference.markdown import GENERATED, code, prose, table
from workflows.reference.schema import reachable, section
from workflows.serve import app, errors, schema
from workflows.serve.deployment import ServeOptions

_OPTIONS = """\
## Options of a service

`mlmamba serve` has the [common ones](cli.md#mlmamba-serve). A Serve config file has all of them, under `args` of the
application `workflows.serve.deployment:application`."""


def http_page() -> str:
    """The whole page."""
    requests = [section(model) for model in reachable(schema.ChatRequest)]
    options = [section(model, _place(places)) for model, places in reachable(ServeOptions).items()]
    head = [GENERATED, "# HTTP interface", prose(app.__doc__), prose(schema.__doc__)]
    return "\n\n".join([*head, *requests, _errors(), _OPTIONS, *options]) + "\n"


def _place(places: list[str]) -> str:
    return f"At {', '.join(map(code, places))}." if places else ""


def _errors() -> str:
    """Every code with its status and the message of the place where it is raised first."""
    found: dict[tuple[str, str], str] = {}
    for file in sorted(Path(errors.__file__).parent.glob("*.py")):
        for status, name, message in raised(ast.parse(file.read_text(encoding="utf-8"))):
            found.setdefault((name, status), message)
    rows = [[code(name), status, message] for (name, status), message in sorted(found.items())]
    return f"## Errors\n\n{prose(errors.__doc__)}\n\n{table(['code', 'status', 'for example'], rows)}"


def raised(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Status, code and message of every ApiError with a fixed status and code; parts that vary are three dots."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) not in ("ApiError", "bad_request"):
            continue
        given = dict(enumerate(call.args)) | {keyword.arg: keyword.value for keyword in call.keywords}
        if call.func.id == "ApiError":
            status, message, name = given.get(0), given.get(1), given.get("code", given.get(3))
        else:
            status, message, name = ast.Constant(400), given.get(0), given.get("code", given.get(2))
        if isinstance(status, ast.Constant) and isinstance(name, ast.Constant) and name.value and message is not None:
            yield str(status.value), name.value, _text(message)


def _text(message: ast.expr) -> str:
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(_text(part) for part in message.values)
    return "..."
