"""Conversations to token ids: the prompt format of the released ML-Mamba, for training and for inference alike.

One turn of the user followed by one of the assistant reads

    {images}<|user|>\\n{message}<|endoftext|>\\n<|assistant|>\\n{answer}<|endoftext|>

and every later user turn starts with one more newline. There is no system prompt and no BOS. The images of a turn
stand before its text: a recurrent model has to see the context before the question (reference: Cobra table 7, where
context after the question costs 15 points). The first turn's images therefore open the sequence, as in the paper.

Inference tokenizes the rendered string as one. Training tokenizes turn by turn (`encode`), which gives the same ids
where every user segment ends in special text and messages are stripped (tests/unit/mlmamba/test_conversation.py, on the
real GPT-NeoX tokenizer). Tokenizers that mark the beginning of every text, as SentencePiece's do, give others: for them
training tokenizes the rendered string as well (`encode_whole`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

IMAGE_TOKEN = "<image>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Turn:
    """One message. `role` is "user" or "assistant"; `images` counts the images shown with it (user turns only). Its
    first `instructions` characters are the system's, which are the same before many questions."""

    role: str
    text: str
    images: int = 0
    instructions: int = field(default=0, compare=False)


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of one conversation.

    `labels` repeats `input_ids` on assistant text and its end token and is IGNORE_INDEX elsewhere. `image_positions`
    holds the index of the first token of each image. `turn_ends` holds, for every assistant turn, the length of the
    conversation up to and including it, which is where a too long conversation may be cut.
    """

    input_ids: list[int]
    labels: list[int]
    image_positions: list[int]
    turn_ends: list[int]


def clean(text: str) -> str:
    """A message without placeholders (also none that appears when another is taken out) and outer white space.

    One pass, whatever the nesting: a placeholder can only be complete where a `>` comes. No end of one is the beginning
    of another, so the order in which they are taken out does not change what is left.
    """
    if IMAGE_TOKEN not in text:
        return text.strip()
    opening = list(IMAGE_TOKEN[:-1])
    kept: list[str] = []
    *closed, rest = text.split(IMAGE_TOKEN[-1])
    for part in closed:
        kept += part
        if kept[-len(opening) :] == opening:
            del kept[-len(opening) :]
        else:
            kept.append(IMAGE_TOKEN[-1])
    kept += rest
    return "".join(kept).strip()


def render_turn(turn: Turn, first: bool, eos: str, tokens_per_image: int = 1) -> str:
    """Text of one turn, each image as `tokens_per_image` placeholders."""
    text = clean(turn.text)
    if turn.role == "user":
        images = IMAGE_TOKEN * (tokens_per_image * turn.images)
        return f"{'' if first else chr(10)}{images}{USER}\n{text}{eos}\n{ASSISTANT}\n"
    return f"{text}{eos}"


def render(turns: Sequence[Turn], eos: str, tokens_per_image: int = 1) -> str:
    """The whole conversation as text. It ends ready for an answer when the last turn is the user's."""
    return "".join(render_turn(turn, i == 0, eos, tokens_per_image) for i, turn in enumerate(turns))


def check_turns(turns: Sequence[Turn], asking: bool = False) -> None:
    """Raise ValueError unless turns have text and alternate user, assistant, user, ...

    Args:
        asking: they are a prompt and not a training sample: an image alone is a question, and an answer that was empty
            may stand in the history.
    """
    if not turns:
        raise ValueError("the conversation has no turns")
    for i, turn in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if turn.role != expected:
            raise ValueError(f"turn {i} has role {turn.role!r}, expected {expected!r}: user and assistant alternate")
        if not clean(turn.text) and not (asking and (turn.images or turn.role == "assistant")):
            raise ValueError(f"turn {i} ({turn.role}) is empty")
        if turn.images and turn.role != "user":
            raise ValueError(f"turn {i} is the assistant's but has {turn.images} images; only users show images")


def _each(turns: Sequence[Turn], tokens: int | Sequence[int]) -> Iterator[int]:
    """Tokens of each image of a conversation."""
    count = sum(turn.images for turn in turns)
    each = [tokens] * count if isinstance(tokens, int) else list(tokens)
    if len(each) != count:
        raise ValueError(f"the turns show {count} images, the tokens of {len(each)} were given")
    return iter(each)


def encode(tokenizer, turns: Sequence[Turn], tokens_per_image: int | Sequence[int]) -> EncodedConversation:
    """Tokenize a conversation for training.

    Args:
        tokenizer: a transformers tokenizer with an `eos_token` and a single id for IMAGE_TOKEN.
        turns: alternating user and assistant turns.
        tokens_per_image: length of one image's placeholder run, or of each image's.

    Raises:
        ValueError: the turns break the rules of `check_turns`, or show another number of images.
    """
    check_turns(turns)
    image_id, each = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), _each(turns, tokens_per_image)
    ids, labels, positions, ends = [], [], [], []
    for i, turn in enumerate(turns):
        text = render_turn(Turn(turn.role, turn.text), i == 0, tokenizer.eos_token)
        if turn.images and i:  # the newline that opens a later user turn stands before its images
            text = text[1:]
            ids += tokenizer("\n", add_special_tokens=False)["input_ids"]
            labels += [IGNORE_INDEX] * (len(ids) - len(labels))
        for _ in range(turn.images):
            positions.append(len(ids))
            run = next(each)
            ids += [image_id] * run
            labels += [IGNORE_INDEX] * run
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if turn.role == "assistant" else [IGNORE_INDEX] * len(piece)
        if turn.role == "assistant":
            ends.append(len(ids))
    return EncodedConversation(ids, labels, positions, ends)


def encode_whole(tokenizer, turns: Sequence[Turn], tokens_per_image: int | Sequence[int]) -> EncodedConversation:
    """Tokenize a conversation for training as inference tokenizes it: the rendered text in one, turns by offsets.

    Args:
        tokenizer: as for `encode`, with `with_offsets(text)`, which gives each token's id and first character.
        turns: alternating user and assistant turns.
        tokens_per_image: length of one image's placeholder run, or of each image's.

    Raises:
        ValueError: the turns break the rules of `check_turns`, or show another number of images.
    """
    check_turns(turns)
    image_id, each = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), _each(turns, tokens_per_image)
    pieces = [render_turn(turn, i == 0, tokenizer.eos_token) for i, turn in enumerate(turns)]
    stops = list(accumulate(map(len, pieces)))  # where each turn's text ends
    ids, labels, positions, ends, turn = [], [], [], [], 0
    for token, start in tokenizer.with_offsets("".join(pieces)):
        while start >= stops[turn]:
            if turns[turn].role == "assistant":
                ends.append(len(ids))
            turn += 1
        if token == image_id:
            positions.append(len(ids))
        run = next(each) if token == image_id else 1
        ids += [token] * run
        labels += [token if turns[turn].role == "assistant" else IGNORE_INDEX] * run
    if turns[-1].role == "assistant":
        ends.append(len(ids))
    return EncodedConversation(ids, labels, positions, ends)
