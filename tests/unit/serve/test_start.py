"""Starting and stopping from the command line: what can be checked without starting Ray."""

import os
import signal
import socket
import threading

import pytest
from pydantic import ValidationError

from workflows.cli import main
from workflows.errors import UsageError
from workflows.serve.auth import KEYS_VARIABLE, Access
from workflows.serve.deployment import ServeOptions
from workflows.serve.start import (
    _address,
    _only_here,
    _options,
    _wait_for_interrupt,
    check_certificate,
    check_keys,
    check_port,
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_and_handlers_are_put_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    timer = threading.Timer(0.2, os.kill, (os.getpid(), number))
    timer.start()
    _wait_for_interrupt()
    timer.join()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_port_in_use_names_the_flag():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: 127.0.0.1:{port} is in use; .* another --port"):
            check_port("127.0.0.1", port)
        with pytest.raises(UsageError, match="in use"):
            check_port("0.0.0.0", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "flag"), [("127.0.0.1", 70_000, "--port 70000"), ("192.0.2.77", 80, "--host")]
)
def test_where_one_cannot_listen(host, port, flag):
    with pytest.raises(UsageError, match=flag):
        check_port(host, port)


def test_hosts_in_urls():
    assert [_address(host) for host in ("0.0.0.0", "::", "::1", "here")] == ["127.0.0.1", "[::1]", "[::1]", "here"]


@pytest.mark.parametrize(
    ("host", "only_here"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("here", False)],
)
def test_which_addresses_others_can_reach(host, only_here):
    assert _only_here(host) == only_here


def test_a_certificate_needs_both_files_that_fit(tmp_path):
    assert check_certificate(None, None) is None
    with pytest.raises(UsageError, match="give both"):
        check_certificate("key.pem", None)
    (tmp_path / "wrong").write_text("no certificate")
    for name in ("wrong", "absent"):
        with pytest.raises(UsageError, match=r"--ssl-keyfile .*cannot be used"):
            check_certificate(str(tmp_path / name), str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--root-path", "llm"], "--root-path llm: it begins with /"),
        (["--root-path", "/llm/"], "--root-path /llm/"),
        (["--max-tokens", "0"], "--max-tokens: "),
        (["--max-model-len", "-1"], "--max-model-len: "),
        (["--ssl-keyfile", "x"], "give both"),
        (["--served-model-name", ""], "--served-model-name: "),
        (["--origins", "chat.example.com"], "--origins: "),
        (["--origins", "https://chat.example.com/"], "without a path"),
        (["--origins", "*"], "API keys are needed"),
    ],
)
def test_options_that_cannot_be(options, message, capsys, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert main(["serve", "nowhere", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_address_that_others_reach_needs_keys(monkeypatch, tmp_path):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=r"--host 0\.0\.0\.0: .*MLMAMBA_API_KEYS.*--api-keys-file.*--no-api-keys"):
        check_keys("0.0.0.0", Access(), needed=True)
    assert not check_keys("0.0.0.0", Access(), needed=False)
    (tmp_path / "keys").write_text("a-key\n")
    check_keys("0.0.0.0", Access(api_keys_file=str(tmp_path / "keys")), needed=True)
    with pytest.raises(UsageError, match="cannot read"):
        check_keys("127.0.0.1", Access(api_keys_file=str(tmp_path / "nowhere")), needed=False)
    monkeypatch.setenv(KEYS_VARIABLE, "one,two")
    assert check_keys("0.0.0.0", Access(), needed=True)
    assert check_keys("127.0.0.1", Access(), needed=False)  # who gives keys means them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--poll-seconds", "0"], "--poll-seconds: Input should be greater than 0"),
        (["--image-urls", "nonsense"], "--image-urls: "),
        (["--host", "0.0.0.0"], "API keys are needed"),
    ],
)
def test_the_command_refuses_before_it_starts_anything(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    port = ["--port", "0"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port[1] = str(listener.getsockname()[1])
    assert main(["serve", "models:/a@b", *port, "--storage", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


HAVE = {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((1, None, None, None), (1, None, 8, 1.0)),
        ((2, None, None, None), (2, None, 4, 1.0)),
        ((4, None, None, None), (4, None, 2, 0.0)),
        ((2, 4, None, 0.5), (2, 4, 2, 0.5)),
        ((2, 2, 3, 0), (2, None, 3, 0)),
    ],
)
def test_what_a_replica_gets(asked, expected, tmp_path):
    options = _options(HAVE, "models:/a@b", tmp_path, *asked)
    most = options.autoscaling and options.autoscaling.max_replicas
    assert (options.replicas, most, options.threads, options.gpus) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((9, None, None, None), "--replicas 9"),
        ((3, None, 4, None), "--replicas 3: with 4 CPU cores each"),
        ((2, 1, None, None), "--max-replicas 1: must be at least --replicas 2"),
        ((3, None, None, 1), "--gpus 1: from 0 to 1 for each of 3 replicas; Ray has 2 GPUs here"),
    ],
)
def test_more_than_there_is_names_the_option(asked, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        _options(HAVE, "models:/a@b", tmp_path, *asked)


def test_options_that_contradict_each_other():
    with pytest.raises(ValidationError, match=r"autoscaling\.max_replicas = 1 is under replicas = 2"):
        ServeOptions(model="models:/a@b", storage="s", replicas=2, autoscaling={"max_replicas": 1})
