"""Looking at prompts before anything is asked: a prompt that a model cannot take is known by its id at once."""

from collections.abc import Sequence

from mlmamba.conversation import Turn, clean
from mlmamba.processing import MLMambaProcessor
from workflows.evaluate.benchmarks.base import Item

_AT_ONCE = 1000


def bad_prompts(processor: MLMambaProcessor, items: Sequence[Item]) -> dict[str, str]:
    """Why items cannot be asked, by id: the prompt is empty, or longer than the model takes."""
    bad = {item.id: "the question is empty" for item in items if not clean(item.question)}
    fine = [item for item in items if item.id not in bad]
    for first in range(0, len(fine), _AT_ONCE):
        some = fine[first : first + _AT_ONCE]
        texts = [processor.prompt([Turn("user", i.prompt, images=int(i.image is not None))]) for i in some]
        rows = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for item, row in zip(some, rows, strict=True):
            length = len(row) + (item.image is not None) * (processor.tokens_per_image - 1)
            if length > processor.max_length:
                bad[item.id] = f"the prompt has {length:,} tokens, over the model's {processor.max_length:,}"
    return bad
