"""Whether a tokenizer gives in training the ids that it gives at inference, tried on the corpus's own conversations.

Inference tokenizes a rendered prompt, and the model goes on from its last token. So the ids of a whole conversation
must begin with those of each of its prompts, and training must learn from exactly these ids.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from mlmamba.conversation import IMAGE_TOKEN, Turn, encode, encode_whole, format_of, render

CONVERSATIONS = 100  # of the corpus that are tried
_PER_IMAGE = 2
_ALWAYS = [
    [Turn("user", "What is in the image?", images=1), Turn("assistant", "A dog.")],
    [Turn("user", "one", images=2), Turn("assistant", "1"), Turn("user", "Why?\n\nSay it."), Turn("assistant", "é 犬")],
]
"""Tried besides, so that a corpus without images or second turns is no excuse."""


def needs_whole_text(tokenizer, conversations: Iterable[Sequence[Turn]], name: str) -> bool:
    """Whether conversations must be tokenized as one text, because turn by turn gives other ids.

    Args:
        tokenizer: a `WorkerTokenizer`.
        conversations: that `check_turns` accepts.
        name: of the tokenizer, for errors.

    Raises:
        ValueError: neither way gives the ids of inference.
    """
    whole, written = False, partial(render, eos=tokenizer.eos_token, chat=format_of(tokenizer))
    tried = [*_ALWAYS, *conversations]
    for turns in tried:
        ids = _ids(tokenizer, written(turns, tokens_per_image=_PER_IMAGE))
        if ids.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) != _PER_IMAGE * sum(turn.images for turn in turns):
            raise ValueError(f"the tokenizer {name!r} does not keep {IMAGE_TOKEN} as one token; use another one")
        for answer in range(1, len(turns), 2):
            prompt = _ids(tokenizer, written(turns[:answer], tokens_per_image=_PER_IMAGE))
            if ids[: len(prompt)] != prompt:
                text = written(turns[: answer + 1])[-80:]
                raise ValueError(
                    f"the tokenizer {name!r} joins the end of a prompt with the answer that follows ({text!r}): the "
                    "model would learn to go on from other tokens than it gets at inference; use another tokenizer"
                )
        whole = whole or encode(tokenizer, turns, _PER_IMAGE).input_ids != ids
    for turns in tried if whole else ():
        encoded = encode_whole(tokenizer, turns, _PER_IMAGE)
        ids = _ids(tokenizer, written(turns, tokens_per_image=_PER_IMAGE))
        prompts = [written(turns[:i], tokens_per_image=_PER_IMAGE) for i in range(1, len(turns), 2)]
        starts = [i for i in range(1, len(ids)) if encoded.labels[i] >= 0 > encoded.labels[i - 1]]
        if encoded.input_ids != ids or starts != [len(_ids(tokenizer, prompt)) for prompt in prompts]:
            raise ValueError(
                f"the tokenizer {name!r} gives other ids turn by turn than for a whole conversation, and does not tell "
                f"where its tokens begin ({turns[0].text[:80]!r}); use another tokenizer"
            )
    return whole


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
