"""LiteLLM's client against a service. Run by an interpreter that has litellm: URL KEY IMAGE (a data: URI)."""

import json
import sys

import litellm

url, key, image = sys.argv[1:]
common = {"model": "openai/shapes", "api_base": url + "/v1", "api_key": key, "temperature": 0, "num_retries": 0}
shown = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": image}}]
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": shown}]

answer = litellm.completion(messages=messages, max_tokens=40, **common)
text = answer.choices[0].message.content
assert answer.usage.completion_tokens > 0, answer
streamed = litellm.completion(
    messages=messages, max_tokens=40, stream=True, stream_options={"include_usage": True}, **common
)
assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == text
several = litellm.completion(messages=messages, max_tokens=9, n=3, **{**common, "temperature": 1.0}, seed=3)
assert len(several.choices) == 3, several
schema = {"type": "object", "properties": {"sides": {"type": "integer", "maximum": 9, "minimum": 0}}}
schema |= {"required": ["sides"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema, "strict": True}}
made = litellm.completion(messages=messages, max_tokens=400, response_format=form, **common)
print("json_schema", json.dumps(json.loads(made.choices[0].message.content)))
choice = litellm.completion(messages=messages, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, **common)
assert choice.choices[0].message.content in ("yes", "no"), choice
for fields in ({"max_tokens": 10**6}, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}):
    try:
        litellm.completion(messages=messages, **fields, **common)
    except litellm.BadRequestError as error:
        print(next(iter(fields)), type(error).__name__)
try:
    litellm.completion(messages=messages, **{**common, "api_key": "another"})
except litellm.AuthenticationError:
    print("key AuthenticationError")
