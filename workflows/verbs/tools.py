"""convert and doctor."""

import argparse

from workflows.errors import WorkflowError
from workflows.verbs.verb import Verb


def convert(a: argparse.Namespace) -> dict:
    """turn a checkpoint of state-spaces, transformers or the ML-Mamba release into another layout"""
    from mlmamba.convert import convert as run

    try:
        done = run(
            a.source,
            a.destination,
            a.to,
            tokenizer=a.tokenizer,
            preset=a.preset,
            vision_weights=a.vision_weights,
            torch_file=a.torch_file,
        )
    except (OSError, ValueError) as error:
        raise WorkflowError(f"convert: {error}") from error
    text = f"{done.folder}: {done.layout}, {done.parameters:,} parameters (from {done.source_layout})"
    return {**done.as_dict(), "text": text}


def doctor(a: argparse.Namespace) -> dict:
    """what is installed, which kernels will be used, and what to do about what is missing"""
    from workflows.doctor import examine, report

    findings = examine()
    summary = {"findings": [finding.as_dict() for finding in findings]}
    return {**summary, "failed": any(f.state == "missing" for f in findings), "text": report(findings)}


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="released .pt file, or folder or hub name of a Mamba-2 language model or ML-Mamba model"
    )
    parser.add_argument("destination", help="folder to write; nothing may be there")
    parser.add_argument(
        "--to",
        choices=["mlmamba", "transformers", "state-spaces"],
        help="layout (default: mlmamba for a released file, transformers for a language model)",
    )
    parser.add_argument(
        "--torch-file",
        action="store_true",
        help="state-spaces: also pytorch_model.bin, which mamba_ssm opens",
    )
    parser.add_argument("--tokenizer", default="EleutherAI/gpt-neox-20b", help="released file: its tokenizer")
    parser.add_argument("--preset", default="2.7b", help="released file: the preset with its encoders (default: 2.7b)")
    parser.add_argument(
        "--vision-weights",
        action="append",
        metavar="FILE",
        help="released file: one per encoder (default: timm's, by hub)",
    )


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


CONVERT = Verb(convert, _convert_arguments)
DOCTOR = Verb(doctor, _no_arguments)
