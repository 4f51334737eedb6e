"""API keys: where they come from, and who is let in."""

import pytest
from pydantic import ValidationError

from workflows.serve.auth import KEYS_VARIABLE, OPEN, Access, Gate
from workflows.serve.openai import ApiError


def scope(path="/v1/models", method="GET", client="10.0.0.9", **headers):
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"path": path, "method": method, "headers": pairs, "client": (client, 1234)}


def checked(gate, **given):
    given = {"authorization": given.pop("key")} | given if given.get("key") is not None else given
    given.pop("key", None)
    asked = scope(**given)
    return gate.check(asked, asked["path"])


def test_without_keys_everyone_may_ask():
    gate = Gate(Access().keys({}))
    assert not gate.has_keys
    assert checked(gate) == "10.0.0.9"
    assert checked(gate, key="Bearer whatever", client="::1") == "::1"


@pytest.mark.parametrize("header", ["Bearer k1", "bearer k1", "Bearer  k1 ", "Bearer schl\u00c3\u00bcssel"])
def test_a_known_key_is_accepted_and_names_the_client(header):
    gate = Gate(["k1", "schlüssel"])
    client = checked(gate, key=header)
    assert client == checked(gate, key=header, client="another address")
    assert "k1" not in client


@pytest.mark.parametrize("header", [None, "", "k1", "Bearer", "Bearer ", "Bearer k", "Basic k1", "Bearer \xff"])
def test_anything_else_is_not(header):
    with pytest.raises(ApiError) as caught:
        checked(Gate(["k1", "k2"]), key=header)
    assert caught.value.status == 401
    assert caught.value.headers() == {"WWW-Authenticate": "Bearer"}
    assert caught.value.type == "authentication_error"
    assert "k1" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/swap", "/v2/x", "/docs", "/llm/v1/models", "//v1/models", "", "/healthz/"]
)
def test_a_path_that_is_not_known_to_be_open_needs_a_key(path):
    with pytest.raises(ApiError, match="needs an API key"):
        checked(Gate(["k1"]), path=path)


@pytest.mark.parametrize("path", OPEN)
def test_open_paths_need_none(path):
    checked(Gate(["k1"]), path=path)


ODD = ("", "http://[bad", "127.0.0.1:8000", "\xff", "http://", "http://u@127.0.0.1:8000", "http://127.0.0.1:8000/x")


def test_without_keys_no_page_of_another_site_is_answered():
    gate, json = Gate(), "application/json; charset=utf-8"
    checked(gate, method="POST", host="127.0.0.1:8000", origin="http://127.0.0.1:8000", content_type=json)
    checked(gate, method="POST", host="localhost:8000", content_type=json)
    for origin in ("http://evil.example", "null", "http://127.0.0.1:8001", "http://127.0.0.1:8000.evil.example", *ODD):
        with pytest.raises(ApiError) as caught:
            checked(gate, method="POST", host="127.0.0.1:8000", origin=origin, content_type=json)
        assert caught.value.status == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; x=application/json"):
        with pytest.raises(ApiError) as caught:
            checked(gate, method="POST", host="127.0.0.1:8000", content_type=kind)
        assert caught.value.status == 415
    # A key is proof enough: no page has one.
    checked(Gate(["k1"]), key="Bearer k1", method="POST", host="x", origin="http://y", content_type="text/plain")


def test_a_service_of_this_machine_is_asked_for_by_its_own_names():
    gate = Gate((), ("localhost", "127.0.0.1", "::1"))
    for host in ("localhost:8000", "LOCALHOST", "127.0.0.1:8000", "[::1]:8000"):
        checked(gate, host=host)
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "[", "a@localhost.x"):
        with pytest.raises(ApiError) as caught:
            checked(gate, host=host, path="/healthz")
        assert caught.value.status == 421


def test_keys_come_from_a_file_and_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# comment\n\n  a-key  \nb-key\n")
    assert Access(api_keys_file=str(file)).keys({KEYS_VARIABLE: "c, d,"}) == ["a-key", "b-key", "c", "d"]
    assert Access().keys({KEYS_VARIABLE: "c"}) == ["c"]


def test_keys_that_were_meant_and_are_not_there_are_an_error(tmp_path):
    """An empty file must not open the service to everyone."""
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    with pytest.raises(ValueError, match="holds no key"):
        Access(api_keys_file=str(empty)).keys({})
    with pytest.raises(ValueError, match="cannot read"):
        Access(api_keys_file=str(tmp_path / "missing")).keys({})
    with pytest.raises(ValueError, match=f"{KEYS_VARIABLE} is set and holds no key"):
        Access().keys({KEYS_VARIABLE: " ,"})


def test_patterns_are_checked_with_the_config():
    assert Access(image_urls=("https://a.example/*",)).image_urls
    with pytest.raises(ValidationError, match="is not of the form https://HOST/PATH"):
        Access(image_urls=("*",))
