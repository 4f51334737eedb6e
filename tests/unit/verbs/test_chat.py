"""`mlmamba chat` without --question: a conversation in which a later turn reads only what is new."""

import io
from string import ascii_letters

import pytest
import torch

from mlmamba.conversation import Turn
from mlmamba.loading import load_model
from mlmamba.modeling import MLMambaForConditionalGeneration
from tests.helpers.images import encoded
from tests.helpers.tiny import NATIVE, VOCABULARY, tiny_model, tiny_tokenizer
from workflows.errors import UsageError
from workflows.train.initial import save
from workflows.verbs import chat

QUESTIONS = ["what is shown?", "sure?", "why?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that answers in letters alone, which come out of the tokenizer as they went in."""
    torch.set_num_threads(1)
    folder, tokenizer = tmp_path_factory.mktemp("chat") / "model", tiny_tokenizer()
    model = tiny_model({"tie_word_embeddings": False}, max_position_embeddings=2000)
    letters = {token for name, token in tokenizer.get_vocab().items() if len(name) == 1 and name in ascii_letters}
    model.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in letters]
    save(model, tokenizer, folder)
    return folder


@pytest.fixture
def image(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(1))
    return str(tmp_path / "image.png")


def talk(folder, image, questions, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*questions, ""]) + "\n"))
    chat.talk(str(folder), folder, image)
    return capsys.readouterr()


def test_a_conversation_has_the_answers_of_generate_and_reads_each_turn_once(folder, image, monkeypatch, capsys):
    read, forward = [], MLMambaForConditionalGeneration.forward

    def counted(self, input_ids, **kwargs):
        read.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MLMambaForConditionalGeneration, "forward", counted)
        said = talk(folder, image, QUESTIONS, monkeypatch, capsys).out.replace("> ", "").split()
    model, processor = load_model(folder)
    turns = []
    for question, answer in zip(QUESTIONS, said, strict=True):
        turns.append(Turn("user", question, images=int(not turns)))
        inputs = processor([image], processor.prompt(turns))
        ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)
        assert processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]) == answer
        turns.append(Turn("assistant", answer))
    # Of an answer before, the state had read all but the last token.
    assert sum(length for length in read if length > 1) == inputs["input_ids"].shape[1] - 2 * 255


def test_a_question_that_cannot_be_asked_leaves_the_conversation_as_it_was(folder, image, monkeypatch, capsys):
    plain = talk(folder, image, QUESTIONS[:2], monkeypatch, capsys)
    disturbed = talk(folder, image, [QUESTIONS[0], "<|user|>", "x" * 3000, QUESTIONS[1]], monkeypatch, capsys)
    assert disturbed.out.replace("> ", "") == plain.out.replace("> ", "")
    assert "a mark of the prompt format" in disturbed.err
    assert "over the limit of 2000" in disturbed.err


def test_one_question_that_cannot_be_asked_is_a_mistake_in_the_command(folder, image):
    with pytest.raises(UsageError, match="a mark of the prompt format"):
        chat.answer_once(str(folder), folder, image, "<|endoftext|>", 8)
    assert chat.answer_once(str(folder), folder, image, "what?", 8).isalpha()


def test_an_image_that_does_not_fit_is_refused_by_its_size(tmp_path, monkeypatch, capsys):
    """The file ends behind its header: whoever decoded it would say so."""
    folder, large = tmp_path / "model", tmp_path / "large.png"
    save(tiny_model(vision_config=NATIVE | {"max_tokens": 40}, max_position_embeddings=68), tiny_tokenizer(), folder)
    large.write_bytes(encoded(1, "PNG", (300, 200))[:100])
    with pytest.raises(UsageError, match=r"70 tokens long, of which its image takes 40 \(300 x 200 takes 40\), over"):
        chat.answer_once(str(folder), folder, str(large), "what?", 8)
    with pytest.raises(UsageError, match=r"--image .*large.png: the image ends before its data does"):
        chat.answer_once(str(folder), folder, str(large), "", 8)
    with pytest.raises(UsageError, match=r"--image .*none.png: No such file"):
        chat.answer_once(str(folder), folder, str(tmp_path / "none.png"), "what?", 8)
