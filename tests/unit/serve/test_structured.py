"""What a request says about the form of its answers, and what is refused before anything is compiled."""

import json

import pytest

from workflows.serve.grammar import GrammarError
from workflows.serve.openai import ApiError, parse_request
from workflows.serve.structured import choice_form, json_form

MOST = 1000
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def parse(**fields):
    return parse_request(json.dumps({"messages": [{"role": "user", "content": "hello"}], **fields}).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA, "regex": None}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ],
)
def test_a_schema_by_any_name_is_the_same_form(fields):
    assert parse(**fields).form(MOST) == json_form(SCHEMA, "", MOST)


def test_words_by_any_name_are_the_same_form():
    forms = [parse(**{"guided_choice": ["a", "b"]}), parse(structured_outputs={"choice": ["a", "b"]})]
    assert [request.form(MOST) for request in forms] == [choice_form(["a", "b"], "", MOST)] * 2


def test_json_objects_by_any_name_are_the_same_form():
    forms = [parse(response_format={"type": "json_object"}), parse(structured_outputs={"json_object": True})]
    assert [request.form(MOST) for request in forms] == [json_form({"type": "object"}, "", MOST)] * 2


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {"json_object": False}}]
)
def test_what_asks_for_no_form(fields):
    assert not parse(**fields).gives_form


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs the field json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", "req"),
        ({"response_format": "json"}, "response_format", "object"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs", "choice, json and json_object"),
        ({"structured_outputs": {"choice": "yes"}}, "structured_outputs.choice", "valid array"),
        ({"guided_choice": [1] * 9}, "guided_choice", "every word"),
        ({"guided_regex": "a+"}, "guided_regex", "not supported"),
        ({"guided_json": 5}, "guided_json", "valid dictionary|object"),
    ],
)
def test_a_wrong_field_is_named(fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param.startswith(param)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_choice": []}, "at least one word"),
        ({"guided_choice": ["a", ""]}, "is empty"),
        ({"guided_choice": ["a", "b\n"]}, "white space outside"),
        ({"guided_choice": ["word" * 300]}, "over this server's limit of 1,000"),
        ({"guided_json": "{"}, "not JSON"),
        ({"guided_json": "[" * 900}, "not JSON"),
        ({"guided_json": "[1]"}, "JSON object"),
        ({"guided_json": '{"minimum": NaN}'}, "number that cannot be used"),
        ({"guided_json": {"enum": ["x" * 2000]}}, "over this server's limit of 1,000"),
        ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "both give the answer a form"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused(fields, message):
    with pytest.raises(GrammarError, match=message) as caught:
        parse(**fields).form(MOST)
    assert caught.value.param


def test_the_compilers_options_are_not_the_clients():
    form = json_form({"type": "object", "x-guidance": {"lenient": True}}, "guided_json", MOST)
    assert '"lenient": true' not in form.grammar
    assert form == json_form({"type": "object"}, "response_format", MOST)
