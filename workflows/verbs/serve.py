"""serve and chat: asking a model, over HTTP or in the terminal."""

import argparse

from workflows.verbs.verb import Verb, storage_option


def serve(a: argparse.Namespace) -> None:
    """serve models:/NAME@ALIAS over HTTP, OpenAI style"""
    from workflows.layout import open_storage
    from workflows.serve.run import serve_model

    serve_model(a.model, open_storage(a.storage), a.host, a.port, replicas=a.replicas)


def chat(a: argparse.Namespace) -> dict | None:
    """ask a model one question about a picture, or talk to it"""
    from workflows.chat import answer_once, talk
    from workflows.layout import open_storage

    storage = open_storage(a.storage)
    if a.question is None:
        return talk(a.model, storage, a.image)
    answer = answer_once(a.model, storage, a.image, a.question, a.max_new_tokens)
    return {"answer": answer, "text": answer}


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="models:/NAME@ALIAS or a model folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1)
    storage_option(parser)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or models:/NAME@ALIAS")
    parser.add_argument("--image", metavar="FILE", help="the picture")
    parser.add_argument("--question", metavar="TEXT", help="ask this and stop; without it, talk")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    storage_option(parser)


SERVE = Verb(serve, _serve_arguments)
CHAT = Verb(chat, _chat_arguments)
