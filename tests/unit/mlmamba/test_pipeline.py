"""transformers' own image-text-to-text pipeline on a saved folder: chats, images in every form, batches, streams."""

import base64
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer, pipeline

import mlmamba
from mlmamba import images as gate
from tests.helpers.images import encoded, image
from tests.helpers.tiny import PER_IMAGE, SIDE, tiny_model, tiny_tokenizer

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def question(text: str, *images) -> list[dict]:
    shown = [p if isinstance(p, dict) else {"type": "image", "image": p} for p in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=400).save_pretrained(path)
    mlmamba.MLMambaProcessor(
        tiny_tokenizer(), image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=400
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-text-to-text", model=str(folder), device="cpu")


def new_tokens(pipe, chat: list[dict]) -> list[int]:
    """The answer without the pipeline, as ids: random weights write bytes that are no text."""
    inputs = pipe.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    return pipe.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()


def direct(pipe, chat: list[dict]) -> str:
    """The same as text."""
    return pipe.processor.decode(new_tokens(pipe, chat), skip_special_tokens=True)


def test_the_pipeline_opens_a_folder(pipe):
    assert type(pipe.model) is mlmamba.MLMambaForConditionalGeneration
    assert type(pipe.processor) is mlmamba.MLMambaProcessor


@pytest.mark.parametrize(
    "chat",
    [
        question("what?", image(1)),
        question("which differs?", image(1), image(2), image(3)),
        question("no image at all?"),
        [{"role": "user", "content": "as a string"}],
        [*question("first?", image(1)), {"role": "assistant", "content": "a"}, *question("then?", image(2))],
    ],
    ids=["an image", "three images", "text", "a string", "two turns"],
)
def test_a_chat_is_answered(pipe, chat):
    (answer,) = pipe(text=chat, generate_kwargs=GREEDY, return_full_text=False)
    assert answer["generated_text"] == direct(pipe, chat)
    (whole,) = pipe(text=chat, generate_kwargs=GREEDY)
    assert whole["generated_text"][-1] == {"role": "assistant", "content": answer["generated_text"]}


def test_the_answer_depends_on_the_image(pipe):
    assert len({tuple(new_tokens(pipe, question("what?", image(seed)))) for seed in range(4)}) > 1


def test_several_chats_are_answered_in_order_and_in_batches(pipe):
    chats = [question("a?", image(1)), question("a longer one?", image(2)), question("b?", image(3), image(4))]
    expected = [new_tokens(pipe, chat) for chat in chats]
    assert len(set(map(tuple, expected))) == 3
    for batch_size in (1, 3):
        answers = pipe(text=chats, generate_kwargs=GREEDY, return_tensors=True, batch_size=batch_size)
        assert [answer[0]["generated_token_ids"][-12:].tolist() for answer in answers] == expected


def test_an_answer_goes_on_from_its_start(pipe):
    chat = [*question("what?", image(1)), {"role": "assistant", "content": [{"type": "text", "text": "It"}]}]
    (answer,) = pipe(text=chat, generate_kwargs=GREEDY)
    inputs = pipe.processor.apply_chat_template(chat, continue_final_message=True, tokenize=True, return_dict=True)
    ids = pipe.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    text = pipe.processor.decode(ids, skip_special_tokens=True)
    assert answer["generated_text"][-1]["content"][-1]["text"] == "It" + text


def test_a_prompt_and_its_image_outside_a_chat(pipe):
    chat = question("what?", image(1))
    prompt = pipe.processor.apply_chat_template(chat, add_generation_prompt=True)
    (answer,) = pipe(images=image(1), text=prompt, generate_kwargs=GREEDY, return_full_text=False)
    assert answer["generated_text"] == direct(pipe, chat)


@pytest.fixture(scope="module")
def url():
    class Images(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/1.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(encoded(1) if found else b"no")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Images)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_images_come_in_every_form(pipe, tmp_path, url):
    path = tmp_path / "1.png"
    path.write_bytes(encoded(1))
    data = base64.b64encode(encoded(1)).decode()
    forms = [
        {"type": "image", "image": np.asarray(image(1))},
        {"type": "image", "image": torch.from_numpy(np.asarray(image(1)).transpose(2, 0, 1).copy())},
        {"type": "image", "image": encoded(1)},
        {"type": "image", "path": str(path)},
        {"type": "image", "image": path},
        {"type": "image", "base64": data},
        {"type": "image", "url": f"{url}/1.png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    expected = pipe.processor(images=image(1))["pixel_values"]
    for form in forms:
        inputs = pipe.processor.apply_chat_template(question("what?", form), tokenize=True, return_dict=True)
        assert torch.equal(inputs["pixel_values"], expected), form


def test_a_url_without_an_image_is_an_error(pipe, url):
    with pytest.raises(ValueError, match=r"cannot fetch the image at http://127.0.0.1:\d+/2.png: .*404"):
        pipe(text=question("what?", {"type": "image", "url": f"{url}/2.png"}))


def test_an_image_at_a_url_that_does_not_end_is_not_read_on(url, monkeypatch):
    monkeypatch.setattr(gate, "_MOST_BYTES", 10)
    with pytest.raises(gate.ImageError, match="has over 10 bytes") as caught:
        gate.as_image(f"{url}/1.png")
    assert caught.value.reason == "image_bomb"


def test_answers_stream(pipe, capsys):
    chat = question("what?", image(1))
    expected = direct(pipe, chat)
    printer = TextStreamer(pipe.processor, skip_prompt=True, skip_special_tokens=True)
    pipe(text=chat, generate_kwargs={**GREEDY, "streamer": printer})
    assert capsys.readouterr().out == expected + "\n"
    pieces = TextIteratorStreamer(pipe.processor, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=pipe, kwargs={"text": chat, "generate_kwargs": {**GREEDY, "streamer": pieces}})
    thread.start()
    assert "".join(pieces) == expected
    thread.join()
