"""submit: a workflow as a job on a Ray cluster."""

import argparse
import os

from workflows.errors import UsageError
from workflows.verbs.verb import Verb, open_console, set_option


def submit(a: argparse.Namespace) -> dict:
    """the same `run` as a job on a Ray cluster; --follow, --status and --stop find it again"""
    asked = [name for name in ("follow", "status", "stop") if getattr(a, name) is not None]
    if len(asked) + (a.recipe is not None) != 1:
        raise UsageError("submit wants either a RECIPE, or one of --follow, --status and --stop with a job's id")
    if not a.address and not a.dry_run:
        raise UsageError("--address is missing: http://HEAD:8265, the dashboard of the cluster's head node")
    if a.recipe is not None:
        return _send(a)
    if a.dry_run:
        raise UsageError(
            "--dry-run lists what would travel with a RECIPE; leave it out with --follow, --status, --stop"
        )
    cluster = _cluster(a)
    if a.status is not None:
        return _status(cluster, a.status)
    return _stop(cluster, a.stop) if a.stop else _follow(cluster, a.follow)


def _send(a: argparse.Namespace) -> dict:
    import tempfile
    from pathlib import Path

    from workflows.submit.bundle import make_shipment
    from workflows.submit.package import pack

    if a.storage is None:
        raise UsageError("--storage is missing: the folder of everything that is made, as the cluster's nodes see it")
    shipment = make_shipment(a.recipe, a.set, a.storage, a.verb, a.data_root, a.env)
    console = open_console()
    cluster = None if a.dry_run else _cluster(a)
    with tempfile.TemporaryDirectory() as folder:
        package = pack(Path(folder) / "job.zip", Path.cwd(), a.storage, shipment.made, a.exclude)
        if cluster is None:
            return _would_ship(shipment.submission.run, package)
        console.line(f"== submit {shipment.submission.run}")
        console.note(f"ships {package.describe()}; everyone who may use the cluster can read them:")
        for line in package.travelling():
            console.note(f"  {line}")
        if package.kept:
            console.note(f"{len(package.kept):,} files and folders stay here:")
        for line in package.staying():
            console.note(f"  {line}")
        job = cluster.submit(
            shipment.submission, package.file, shipment.arguments, a.python, shipment.env, shipment.about
        )
    console.note(f"job {job} at {cluster.address}")
    if a.no_wait:
        return {"job": job, "status": "PENDING", "text": _how_to(cluster, job)}
    return _follow(cluster, job)


def _cluster(a: argparse.Namespace):
    from workflows.submit.client import Cluster

    return Cluster(a.address, a.any_ray)


def _would_ship(run: str, package) -> dict:
    """What --dry-run answers: every file that would travel, and every one that stays here with the reason."""
    lines = [
        f"{run} would ship {package.describe()}:",
        *(f"  {line}" for line in package.travelling(every=True)),
        f"{len(package.kept):,} files and folders stay here, besides what git ignores:",
        *(f"  {line}" for line in package.staying(every=True)),
        "nothing was sent",
    ]
    kept = [{"name": one.name, "reason": one.reason} for one in package.kept]
    return {"run": run, "bytes": package.size, "files": package.sizes, "stay": kept, "text": "\n".join(lines)}


def _follow(cluster, job: str) -> dict:
    """Show the job's progress to its end. Ctrl-C stops showing it; the job goes on."""
    from workflows.submit.client import follow_job

    try:
        end = follow_job(cluster, job, open_console().line)
    except KeyboardInterrupt:
        text = f"\nthe job goes on without this client\n{_how_to(cluster, job)}"
        return {"job": job, "status": str(cluster.info(job).status), "failed": True, "text": text}
    return _result(job, end)


def _status(cluster, job: str) -> dict:
    from workflows.submit.client import read_end
    from workflows.submit.log import for_terminal

    if job == "all":
        found = cluster.workflows()
        rows = [{**each.metadata, "job": each.submission_id, "status": str(each.status)} for each in found]
        lines = [for_terminal(f"{row['status']:<10} {row['job']}  {row.get('mlmamba.from', '')}") for row in rows]
        return {"jobs": rows, "text": "\n".join(lines) or f"no submitted workflows at {cluster.address}"}
    end = read_end(cluster, job)
    if end.status in ("PENDING", "RUNNING"):
        return {"job": job, "status": end.status, "text": f"{end.status}\n{_how_to(cluster, job)}"}
    if end.result is None or end.status == "STOPPED":
        last = (end.message.strip().splitlines() or [""])[-1]
        return {"job": job, "status": end.status, "message": last, "text": f"{end.status}  {last}".rstrip()}
    return {**_result(job, end), "failed": False}


def _stop(cluster, job: str) -> dict:
    """Ask the job to end and wait until it has."""
    import time

    from workflows.submit.client import STOP_SECONDS, read_end

    was_running = cluster.stop(job)
    deadline = time.monotonic() + STOP_SECONDS + 30
    while not cluster.info(job).status.is_terminal() and time.monotonic() < deadline:
        time.sleep(1)
    status = read_end(cluster, job).status
    text = f"{job} had ended before: {status}" if not was_running else f"{job}: {status}; submit it again to go on"
    return {"job": job, "status": status, "failed": status in ("PENDING", "RUNNING"), "text": text}


def _result(job: str, end) -> dict:
    """What a local run would have returned, or why there is none."""
    from workflows.errors import WorkflowError

    if end.status == "STOPPED":
        raise WorkflowError(f"job {job} was stopped; submit the recipe again to go on")
    if end.result is None:
        lines = end.message.strip().splitlines() or ["no reason given"]
        raise WorkflowError(f"job {job} failed: {lines[-1]}")
    result = dict(end.result)
    if "evaluation" in result:
        from workflows.verbs.workflow import summary_text

        try:
            result["text"] = summary_text(result)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WorkflowError(f"job {job}: its result cannot be read ({type(error).__name__}: {error})") from error
    from workflows.submit.log import for_terminal

    result["text"] = "\n".join(for_terminal(line) for line in str(result.get("text", "")).split("\n"))
    return {**result, "failed": end.status != "SUCCEEDED"}


def _how_to(cluster, job: str) -> str:
    return "\n".join(
        f"  mlmamba submit --{verb} {job} --address {cluster.address}" for verb in ("follow", "status", "stop")
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="recipe file, or the name of a shipped one")
    set_option(parser)
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS"),
        help="dashboard of the cluster's head node, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)",
    )
    parser.add_argument("--storage", help="absolute folder that every node sees, or s3://bucket/folder")
    parser.add_argument("--follow", metavar="JOB", help="show a job from its beginning to its end")
    parser.add_argument("--status", metavar="JOB", nargs="?", const="all", help="how a job stands; without JOB: all")
    parser.add_argument("--stop", metavar="JOB", help="end a job; what is done stays, submitting again goes on")
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the job is accepted")
    parser.add_argument("--verb", choices=["run", "train", "prepare"], default="run", help="what to do (default: run)")
    parser.add_argument("--data-root", metavar="DIR", help="where the nodes see the recipe's relative paths")
    parser.add_argument("--dry-run", action="store_true", help="list what would travel and what stays; send nothing")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these files here")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="the job gets this variable (no secrets: all see it)",
    )
    parser.add_argument("--python", default="python", help="Python on the cluster's head (default: python)")
    parser.add_argument("--any-ray", action="store_true", help="accept a cluster with another version of Ray")


SUBMIT = Verb(submit, _arguments)
