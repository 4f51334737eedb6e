"""Conversations to token ids: the prompt format, for training and for inference alike.

One turn of the user followed by one of the assistant reads, in the format of the released ML-Mamba,

    {images}<|user|>\\n{message}<|endoftext|>\\n<|assistant|>\\n{answer}<|endoftext|>

and every later user turn starts with one more newline. There is no system prompt and no BOS. Granite 4.0's own format
(its documentation, "Chat template design") has other marks, each one token of its tokenizer, and a system's message:

    {images}<|start_of_role|>user<|end_of_role|>{message}<|end_of_text|>\\n
    <|start_of_role|>assistant<|end_of_role|>{answer}<|end_of_text|>

The images of a turn stand before its text: a recurrent model has to see the context before the question (reference:
Cobra table 7, where context after the question costs 15 points). The first turn's images therefore open the sequence,
as in the paper. A tokenizer carries the name of its format with it (`format_of`).

Inference tokenizes the rendered string as one. Training tokenizes turn by turn (`encode`), which gives the same ids
where every user segment ends in special text and messages are stripped (tests/unit/mlmamba/test_conversation.py, on the
real GPT-NeoX tokenizer). Tokenizers that mark the beginning of every text, as SentencePiece's do, give others: for them
training tokenizes the rendered string as well (`encode_whole`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100
CHAT_FORMAT = "chat_format"
"""Under which tokenizer_config.json has the name of a tokenizer's format."""


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the messages of a conversation, besides the tokenizer's end token."""

    name: str
    user: str
    """Opens a message of the user."""
    assistant: str
    """Opens an answer."""
    marks: tuple[str, ...]
    """What no message of a user may hold."""
    system: str | None = None
    """Opens the system's message. Without, that is the first paragraphs of the first question."""
    reserved: bool = False
    """Whether each mark has to be one special token."""

    def opening(self, instructions: str) -> str:
        """How a conversation begins behind its images that has instructions of the system."""
        return f"{self.user if self.system is None else self.system}{instructions}"


ML_MAMBA = ChatFormat("ml-mamba", "<|user|>\n", "<|assistant|>\n", ("<|user|>", "<|assistant|>"))
GRANITE = ChatFormat(
    "granite",
    *(f"<|start_of_role|>{role}<|end_of_role|>" for role in ("user", "assistant")),
    marks=("<|start_of_role|>", "<|end_of_role|>"),
    system="<|start_of_role|>system<|end_of_role|>",
    reserved=True,
)
FORMATS = {one.name: one for one in (ML_MAMBA, GRANITE)}


def format_of(tokenizer) -> ChatFormat:
    """The format that a tokenizer was prepared for; ML-Mamba's where it says nothing.

    Raises:
        ValueError: there is no such format.
    """
    return format_named(tokenizer.init_kwargs.get(CHAT_FORMAT, ML_MAMBA.name))


def format_named(name: str) -> ChatFormat:
    """The format of a name, or a ValueError."""
    if name not in FORMATS:
        raise ValueError(f"the tokenizer is for the chat format {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def missing_marks(tokenizer, chat: ChatFormat) -> list[str]:
    """Marks of a format that a transformers tokenizer would have to have as special tokens, and has not."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return [mark for mark in chat.marks if mark not in special] if chat.reserved else []


def set_format(tokenizer, chat: ChatFormat) -> None:
    """Have a transformers tokenizer carry the name of a format, also when it is saved and loaded again.

    Raises:
        ValueError: it lacks the format's marks as special tokens.
    """
    if lacking := missing_marks(tokenizer, chat):
        raise ValueError(
            f"the chat format {chat.name!r} needs {' and '.join(chat.marks)} as special tokens, and the tokenizer "
            f"lacks {' and '.join(lacking)}; choose another tokenizer or the format {ML_MAMBA.name!r}"
        )
    if chat is not ML_MAMBA:
        tokenizer.init_kwargs[CHAT_FORMAT] = chat.name


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


def render_turn(turn: Turn, first: bool, eos: str, tokens_per_image: int = 1, chat: ChatFormat = ML_MAMBA) -> str:
    """Text of one turn, each image as `tokens_per_image` placeholders."""
    if turn.role != "user":
        return f"{clean(turn.text)}{eos}"
    begin, text = "" if first else "\n", turn.text
    begin += IMAGE_TOKEN * (tokens_per_image * turn.images)
    if chat.system is not None and (instructions := clean(text[: turn.instructions])):
        begin += f"{chat.opening(instructions)}{eos}\n"
        text = text[turn.instructions :]
    return f"{begin}{chat.user}{clean(text)}{eos}\n{chat.assistant}"


def render(turns: Sequence[Turn], eos: str, tokens_per_image: int = 1, chat: ChatFormat = ML_MAMBA) -> str:
    """The whole conversation as text. It ends ready for an answer when the last turn is the user's."""
    return "".join(render_turn(turn, i == 0, eos, tokens_per_image, chat) for i, turn in enumerate(turns))


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
        tokenizer: a transformers tokenizer with an `eos_token` and a single id for IMAGE_TOKEN. Its format is used.
        turns: alternating user and assistant turns.
        tokens_per_image: length of one image's placeholder run, or of each image's.

    Raises:
        ValueError: the turns break the rules of `check_turns`, or show another number of images.
    """
    check_turns(turns)
    image_id, each = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), _each(turns, tokens_per_image)
    ids, labels, positions, ends, chat = [], [], [], [], format_of(tokenizer)
    for i, turn in enumerate(turns):
        text = render_turn(replace(turn, images=0), i == 0, tokenizer.eos_token, chat=chat)
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
    chat = format_of(tokenizer)
    pieces = [render_turn(turn, i == 0, tokenizer.eos_token, chat=chat) for i, turn in enumerate(turns)]
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
