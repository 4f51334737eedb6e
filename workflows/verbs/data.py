"""data: looking into a prepared data set."""

import argparse

from workflows.errors import UsageError, WorkflowError
from workflows.verbs.verb import Verb


def data(a: argparse.Namespace) -> dict:
    """look into a prepared data set: inspect"""
    from pipelines.contact_sheet import draw_sheet
    from pipelines.inspect import inspect_data, report

    if a.samples < 1:
        raise UsageError(f"--samples {a.samples}: draw at least 1")
    try:
        content = inspect_data(a.uri)
        text = report(content)
        if a.sheet:
            content |= draw_sheet(a.uri, a.sheet, a.split, a.samples, a.seed)
            text += f"\n\nsamples: {content['sheet']}"
    except (OSError, ValueError) as error:
        raise WorkflowError(f"data inspect: {error}") from error
    return {**content, "text": text}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=["inspect"], help="inspect: counts, lengths, sources, what was set aside and why"
    )
    parser.add_argument("uri", help="the data set: a folder or s3://..., as prepare prints it")
    parser.add_argument("--sheet", metavar="FILE.png", help="also draw samples: images, conversation, loss")
    parser.add_argument("--split", default="train", help="split of the sheet (default: train)")
    parser.add_argument("--samples", type=int, default=12, help="samples on the sheet (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="draws other samples (default: 0)")


DATA = Verb(data, _arguments)
