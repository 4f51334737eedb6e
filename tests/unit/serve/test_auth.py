"""API keys: where they come from, and who is let in."""

import pytest
from pydantic import ValidationError

from workflows.serve.auth import KEYS_VARIABLE, Access, Keys
from workflows.serve.openai import ApiError


def test_without_keys_everyone_may_ask():
    keys = Keys(Access().keys({}))
    assert not keys
    keys.check(None)
    keys.check(b"Bearer whatever")


@pytest.mark.parametrize("header", [b"Bearer k1", b"bearer k1", b"Bearer  k1 ", "Bearer schlüssel".encode()])
def test_a_known_key_is_accepted(header):
    Keys(["k1", "schlüssel"]).check(header)


@pytest.mark.parametrize("header", [None, b"", b"k1", b"Bearer", b"Bearer ", b"Bearer k", b"Basic k1", b"Bearer \xff"])
def test_anything_else_is_not(header):
    with pytest.raises(ApiError) as caught:
        Keys(["k1", "k2"]).check(header)
    assert caught.value.status == 401
    assert caught.value.headers() == {"WWW-Authenticate": "Bearer"}
    assert caught.value.type == "authentication_error"
    assert "k1" not in str(caught.value)


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
