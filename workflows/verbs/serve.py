"""serve and chat: asking a model, over HTTP or in the terminal."""

import argparse
import re

from workflows.verbs.verb import Verb, exact_option, precision_option, storage_option


def serve(a: argparse.Namespace) -> None:
    """serve models:/NAME@ALIAS over HTTP, OpenAI style; follows the alias when it moves"""
    from pydantic import ValidationError

    from workflows.errors import UsageError
    from workflows.serve.auth import Access
    from workflows.serve.options import ROOT_PATH, Limits
    from workflows.serve.start import check_certificate, serve_model
    from workflows.serve.swap import SwapOptions
    from workflows.storage.layout import open_local_storage

    try:
        access = Access(
            api_keys_file=_absolute(a.api_keys_file), image_urls=tuple(a.image_urls), origins=tuple(a.origins)
        )
        limits = {name: getattr(a, name) for name in ("max_tokens", "max_model_len", "state_cache_bytes")}
        limits = Limits(**{name: value for name, value in limits.items() if value is not None})
        swap = SwapOptions(poll_seconds=a.poll_seconds, same_answer=a.same_answer)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + "-".join(str(first["loc"][0]).split("_"))
        raise UsageError(f"{option}: {first['msg']}") from error
    if not all(name.strip() == name != "" for name in a.served_model_name):
        raise UsageError("--served-model-name: a name is not empty and has no white space outside")
    if not re.fullmatch(ROOT_PATH, a.root_path):
        raise UsageError(f"--root-path {a.root_path}: it begins with / and ends without, such as /llm")
    serve_model(
        a.model,
        open_local_storage(a.storage),
        a.host,
        a.port,
        replicas=a.replicas,
        max_replicas=a.max_replicas,
        threads=a.threads,
        gpus=a.gpus,
        access=access,
        no_api_keys=a.no_api_keys,
        swap=swap,
        limits=limits,
        precision=a.precision or "auto",
        exact=bool(a.exact),
        routing=a.routing,
        served_names=tuple(a.served_model_name),
        root_path=a.root_path,
        certificate=check_certificate(a.ssl_keyfile, a.ssl_certfile),
    )


def chat(a: argparse.Namespace) -> dict | None:
    """ask a model one question about an image, or talk to it"""
    from workflows.storage.layout import open_local_storage
    from workflows.verbs.chat import answer_once, talk

    storage = open_local_storage(a.storage)
    if a.question is None:
        return talk(a.model, storage, a.image, a.precision or "auto")
    answer = answer_once(a.model, storage, a.image, a.question, a.max_new_tokens, a.precision or "auto")
    return {"answer": answer, "text": answer}


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="models:/NAME@ALIAS or a model folder")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    parser.add_argument("--replicas", type=int, default=1, help="processes, each with a copy of the model (default: 1)")
    parser.add_argument("--max-replicas", type=int, metavar="N", help="up to so many when there is more to do")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU cores of a replica (default: all, shared out)")
    parser.add_argument("--gpus", type=float, metavar="N", help="GPU of a replica, 0 to 1 (default: one each, if any)")
    parser.add_argument(
        "--routing", choices=("load", "session"), default="load", help="to the replica with less to do, or by session"
    )
    parser.add_argument(
        "--state-cache-bytes",
        type=int,
        metavar="N",
        help="memory of a replica for kept states (default: 1 GiB; 0: none)",
    )
    parser.add_argument("--api-keys-file", metavar="FILE", help="API keys, one a line (also MLMAMBA_API_KEYS)")
    parser.add_argument("--no-api-keys", action="store_true", help="serve others than this machine without keys")
    parser.add_argument(
        "--image-urls", action="append", default=[], metavar="PATTERN", help="fetch images from there, repeatable"
    )
    parser.add_argument(
        "--origins", action="append", default=[], metavar="SITE", help="web pages from there may ask (CORS), repeatable"
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="what clients call the model, repeatable; answers give the first (default: its registered name)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer to ask for (default: 1024)")
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt in tokens (default: the model's)"
    )
    parser.add_argument("--root-path", default="", metavar="/PATH", help="path under which a proxy offers the service")
    parser.add_argument("--ssl-keyfile", metavar="FILE", help="private key: serve https, with --ssl-certfile")
    parser.add_argument("--ssl-certfile", metavar="FILE", help="certificate of --ssl-keyfile, with its chain")
    parser.add_argument("--poll-seconds", type=float, default=5, metavar="S", help="between looks at the alias")
    parser.add_argument(
        "--same-answer", action="store_true", help="refuse a version whose answer to its stored image has changed"
    )
    precision_option(parser)
    exact_option(parser)
    storage_option(parser)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or models:/NAME@ALIAS")
    parser.add_argument("--image", metavar="FILE", help="the image")
    parser.add_argument("--question", metavar="TEXT", help="ask this and stop; without it, talk")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")
    precision_option(parser)
    storage_option(parser)


def _absolute(path: str | None) -> str | None:
    from pathlib import Path

    return None if path is None else str(Path(path).absolute())


SERVE = Verb(serve, _serve_arguments)
CHAT = Verb(chat, _chat_arguments)
