"""LangChain against a service. Run by an interpreter that has langchain-openai: URL KEY IMAGE (a data: URI)."""

import asyncio
import json
import sys
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Shape(BaseModel):
    """A shape in the image."""

    colour: Literal["red", "green"]
    sides: int = Field(ge=0, le=9)


url, key, image = sys.argv[1:]
model = ChatOpenAI(base_url=url + "/v1", api_key=key, model="shapes", max_tokens=40, temperature=0, max_retries=0)
shown = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": image}}]
history = [SystemMessage("Be brief."), HumanMessage(shown), AIMessage("a circle"), HumanMessage("sure?")]

answer = model.invoke(history)
assert answer.response_metadata["finish_reason"] in ("stop", "length"), answer
assert answer.usage_metadata["output_tokens"] > 0, answer
assert answer.response_metadata["model_name"] == "shapes", answer
streamed = list(model.stream(history))
assert "".join(chunk.content for chunk in streamed) == answer.content
assert [reply.content for reply in model.batch([history, history])] == [answer.content] * 2
assert asyncio.run(model.ainvoke(history)).content == answer.content
chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")]) | model | StrOutputParser()
assert isinstance(chain.invoke({"question": "hello"}), str)
assert model.bind(logprobs=True, top_logprobs=2).invoke("hello").response_metadata["logprobs"]["content"]
long = model.model_copy(update={"max_tokens": 400})
for method in ("json_schema", "function_calling", "json_mode"):
    try:
        made = long.with_structured_output(Shape if method != "json_mode" else None, method=method).invoke(history)
        print(method, json.dumps(made.model_dump() if isinstance(made, Shape) else made))
    except Exception as error:
        print(method, type(error).__name__, str(error)[:200])
choice = long.bind(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}).invoke(history)
assert choice.content in ("yes", "no"), choice
