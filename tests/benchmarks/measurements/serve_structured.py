"""Answers of a form: how many of random JSON schemas are kept to, and what a token costs with and without.

python -m tests.benchmarks.measurements.serve_structured [--schemas 1000] [--tokenizer tokenizer.json]
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import jsonschema
from transformers import PreTrainedTokenizerFast

from mlmamba.conversation import Turn
from tests.helpers.schemas import random_schema
from tests.helpers.serving import load_tiny
from tests.helpers.tiny import NEOX
from workflows.serve.engine import Engine
from workflows.serve.grammar import Grammars
from workflows.serve.options import Limits
from workflows.serve.sampling import Settings
from workflows.serve.structured import choice_form, json_form

MOST = 2**20
FORMS = {
    "two fields": json_form(
        {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}, "why": {"type": "string"}},
            "required": ["colour", "why"],
            "additionalProperties": False,
        },
        "",
        MOST,
    ),
    "any JSON object": json_form({"type": "object"}, "", MOST),
    "1,000 words": choice_form([f"word{n}" for n in range(1000)], "", MOST),
}


def answers(engine: Engine, schemas: int) -> None:
    """Ask for an answer to each random schema, sampled, and read it."""
    prompt = engine.prepare([Turn("user", "hello")], [])
    ends, began, compiling, tokens = Counter(), time.process_time(), 0.0, 0
    for first in range(0, schemas, 50):
        group = [random_schema(seed) for seed in range(first, min(first + 50, schemas))]
        start = time.process_time()
        compiled = [engine.grammars.compile(json_form(schema, "", MOST)) for schema in group]
        compiling += time.process_time() - start
        wanted = [Settings(4000, temperature=1.0, seed=first + i, grammar=one) for i, one in enumerate(compiled)]
        made = [future.result() for future in [engine.submit(prompt, one) for one in wanted]]
        for schema, answer in zip(group, made, strict=True):
            tokens += answer.completion_tokens
            ends[answer.finish_reason] += 1
            if answer.finish_reason == "stop":
                jsonschema.validate(json.loads(answer.text), schema)  # raises
    spent = time.process_time() - began
    print(f"{schemas} random schemas: {ends['stop']} ended, all of them JSON that satisfies its schema; {dict(ends)}")
    print(f"  {tokens:,} tokens, {spent:.1f} s of CPU; compiling {compiling / schemas * 1e3:.2f} ms a schema (here)")


def beside_free(engine: Engine) -> None:
    """CPU of a token with a form beside one without, in turns."""
    prompt = engine.prepare([Turn("user", "hello")], [])
    form = engine.grammars.compile(json_form({"type": "string", "minLength": 300}, "", MOST))
    spent, made = Counter(), Counter()
    for turn in range(20):
        kind = "with" if turn % 2 else "without"
        settings = Settings(300, 1.0, seed=turn, grammar=form if turn % 2 else None)
        start = time.process_time()
        for future in [engine.submit(prompt, settings) for _ in range(16)]:
            made[kind] += future.result().completion_tokens
        spent[kind] += time.process_time() - start
    each = {kind: spent[kind] / made[kind] for kind in spent}
    print(f"tiny model, 16 at once: a token with a form takes {each['with'] / each['without']:.2f} times one without")
    print(f"  ({each['with'] * 1e6:.0f} and {each['without'] * 1e6:.0f} microseconds of CPU)")


def masks(tokenizer: Path) -> None:
    """CPU of the mask and the step of a grammar, on a real vocabulary."""
    known = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token="<|endoftext|>")
    start = time.process_time()
    grammars = Grammars(known, len(known), [known.eos_token_id])
    grammars.compile(FORMS["any JSON object"])
    print(f"{len(known):,} tokens: read in {time.process_time() - start:.2f} s, once per model")
    draw = random.Random(0)
    for name, form in FORMS.items():
        compiled = grammars.compile(form)
        worst, total, steps = 0.0, 0.0, 0
        while steps < 500:
            matcher, whole = compiled.matcher(), False
            while not whole and steps < 500:
                start = time.process_time()
                allowed = matcher.allowed()
                spent = time.process_time() - start
                token = draw.choice(allowed.nonzero().flatten().tolist())
                if token == known.eos_token_id:
                    break
                start = time.process_time()
                whole = matcher.take(token)
                spent += time.process_time() - start
                worst, total, steps = max(worst, spent), total + spent, steps + 1
        print(f"  {name}: {total / steps * 1e6:.0f} microseconds a token, {worst * 1e3:.1f} ms at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--tokenizer", type=Path, default=NEOX)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(*load_tiny(Path(folder) / "tiny"), Limits(max_tokens=4000, max_waiting=200), threads=1)
    answers(engine, options.schemas)
    beside_free(engine)
    engine.close()
    if options.tokenizer.exists():
        masks(options.tokenizer)


if __name__ == "__main__":
    main()
