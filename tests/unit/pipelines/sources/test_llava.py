"""Conversations in JSON: where messages and images stand, and what is set aside rather than learned blind."""

import base64
import json

import pytest

from pipelines.source_config import LlavaSource
from pipelines.sources import open_source
from pipelines.sources.llava import Llava
from pipelines.validate import check_record, read_images
from tests.helpers.corpora import conversation
from tests.helpers.images import encoded


def entry(name="a", **more) -> dict:
    return {"id": name, "conversations": conversation("<image>\nWhat?", "A dog."), **more}


@pytest.fixture
def llava(tmp_path):
    """A function from entries and options to the list of records."""

    def read(entries, **options):
        (tmp_path / "a.json").write_text(json.dumps(entries))
        config = {"type": "llava", "annotations": str(tmp_path / "a.json"), "images": str(tmp_path / "pics")}
        return list(open_source(LlavaSource(**(config | options))).records())

    return read


def test_images_is_read_like_image(llava):
    two = {"conversations": conversation("<image> or <image>?", "The second.")}
    records = llava([entry(image="1.png"), entry("b", images=["1.png"]), entry("c", images=["1.png", "2.png"], **two)])
    assert [record.images for record in records] == [["1.png"], ["1.png"], ["1.png", "2.png"]]
    assert not any(record.problem for record in records)
    (both,) = llava([entry(image="1.png", images=["1.png"])])
    assert (both.images, both.problem) == (["1.png"], None)
    (other,) = llava([entry(image="1.png", images=["2.png"])])
    assert "both image and images" in other.problem.detail


def test_messages_and_a_missing_id(llava):
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dog."}]
    records = llava([{"messages": turns, "images": ["1.png"]}, {"messages": turns, "images": [], "id": "x"}])
    assert [record.id for record in records] == ["llava[0]", "x"]
    assert records[0].images == ["1.png"]
    assert records[1].problem.reason == "placeholder_mismatch"


def talk(**more) -> dict:
    return {"id": "t", "conversations": conversation("What is in it?", "A dog."), **more}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"image_path": "1.png"}, "image_path"),
        ({"imgs": ["1.png"]}, "imgs"),
        ({"img": "1.png"}, "img"),
        ({"video": "1.mp4"}, "video"),
        ({"image": None}, "image is null"),
        ({"images": None}, "images is null"),
        ({"conversations": conversation("<video>\nWhat is in it?", "A dog.")}, "<video>"),
        ({"conversations": conversation("<image_1> What is in it?", "A dog.")}, "<image_1>"),
    ],
)
def test_an_image_that_is_not_read_sets_its_record_aside_by_name(llava, more, named):
    good, bad, text = llava([entry(image="1.png"), talk(**more), talk(images=[])])
    assert good.problem is text.problem is None
    assert bad.problem.reason == "image_missing"
    assert named in bad.problem.detail
    if "conversations" not in more:
        assert llava([talk(**more)], text_only=True)[0].problem is None


def test_text_among_images_stays_text(llava):
    records = llava([entry(image="1.png"), talk(), talk(images=[]), talk(model="x", image_size=[1, 2])])
    assert [len(record.images) for record in records] == [1, 0, 0, 0]
    assert not any(record.problem for record in records)


def test_a_path_in_full_is_read_relative_to_the_images(llava, tmp_path):
    inside, outside = str(tmp_path / "pics/sub/1.png"), str(tmp_path / "pics-too/1.png")
    records = llava([entry(image=inside), entry("b", image=f"file://{inside}"), entry("c", image=outside)])
    assert [record.images for record in records] == [["sub/1.png"], ["sub/1.png"], []]
    assert "leaves the images folder" in records[2].problem.detail
    (escape,) = llava([entry(image=str(tmp_path / "pics/../secret.png"))])
    assert "leaves the images folder" in escape.problem.detail


def test_images_without_placeholders_name_the_option(llava):
    (record,) = llava([talk(images=["1.png"])])
    assert record.problem.reason == "placeholder_mismatch"
    assert "no_placeholders: first_turn" in record.problem.detail
    assert llava([talk(images=["1.png"])], no_placeholders="first_turn")[0].turns[0].images == 1


def test_an_image_alone_is_asked_about_where_the_source_has_prompts(llava):
    alone = [entry(str(i), image="1.png", conversations=conversation("<image>\n", "A dog.")) for i in range(40)]
    record = llava(alone)[0]
    assert check_record(record).reason == "empty_turn"
    records = llava([*alone, entry(image="1.png")], prompts=["What is it?", "Describe it."])
    assert {record.turns[0].text for record in records[:-1]} == {"<image>What is it?", "<image>Describe it."}
    assert records[-1].turns[0].text == "<image>\nWhat?"
    assert not any(map(check_record, records))
    assert records[:-1] == llava(alone, prompts=["What is it?", "Describe it."])


def test_a_field_that_no_entry_has_stops_with_those_that_they_have(llava):
    for limit in (None, 1):
        with pytest.raises(
            ValueError, match="no entry has the field conversations or messages or prompt; the entries have id, chat"
        ):
            llava([{"id": "a", "chat": []}, {"id": "b", "chat": [], "image": "1.png"}], limit=limit)


def test_the_system_message_by_option(llava):
    turns = [{"from": "system", "value": " Be short. "}, *conversation("<image>\nWhat?", "A dog.")]
    later = [*conversation("<image>\nWhat?", "A dog."), {"from": "system", "value": "Be short."}]
    records = llava([entry(image="1.png"), entry("b", image="1.png", conversations=turns)])
    assert records[1].problem.reason == "malformed"
    assert "system: drop" in records[1].problem.detail
    assert "system: first_turn" in records[1].problem.detail
    (dropped,) = llava([entry(image="1.png", conversations=turns)], system="drop")
    assert dropped.turns == records[0].turns
    (first,) = llava([entry(image="1.png", conversations=turns)], system="first_turn")
    assert first.turns[0].text == "Be short.\n\n<image>\nWhat?"
    assert first.turns[0].images == 1
    (late,) = llava([entry(image="1.png", conversations=later)], system="drop")
    assert "behind the first turn" in late.problem.detail


def data_uri(number: int) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(number)).decode()


def test_images_in_the_messages_as_openai_has_them(tmp_path):
    system = {"role": "system", "content": "Be short."}
    parts = [{"type": "text", "text": "Which is red?"}]
    parts += [{"type": "image_url", "image_url": {"url": data_uri(i), "detail": "low"}} for i in (1, 2)]
    answer = {"role": "assistant", "content": "The second."}
    later = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": data_uri(3)}, {"type": "text", "text": "And?"}],
    }
    lines = [
        {"messages": [system, {"role": "user", "content": parts}, answer, later, answer]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x.org/1.png"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "1.png"}}]}, answer]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}, parts[0]]},
                answer,
            ]
        },
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = LlavaSource(type="llava", annotations=str(tmp_path / "a.jsonl"), system="drop")
    assert config.absolute().images is None
    source = open_source(config)
    talk, text, address, path, broken = source.records()
    assert [turn.images for turn in talk.turns] == [2, 0, 1, 0]
    images, problem = read_images(talk, source)
    assert (images, problem) == ([encoded(i) for i in (1, 2, 3)], None)
    assert (text.images, text.problem) == ([], None)
    assert "is an address; images are not fetched" in address.problem.detail
    assert "the source has no `images`" in path.problem.detail
    assert read_images(broken, source)[1].reason == "image_unreadable"
    assert len(read_images(broken, source)[1].detail) < 200


def test_images_in_the_messages_as_paths(llava):
    answer = {"role": "assistant", "content": "This."}
    own = {"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]}
    mixed = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image", "path": "2.png"}, {"type": "text", "text": "?"}],
    }
    one, two, more = llava(
        [
            {"messages": [own, answer]},
            {"messages": [mixed, answer], "images": ["1.png"]},
            {"messages": [own, answer], "images": ["3.png"]},
        ]
    )
    assert (one.images, two.images) == (["1.png"], ["1.png", "2.png"])
    assert "1 more images than the messages show" in more.problem.detail


def test_prompt_and_completion_as_text_and_as_messages(llava):
    chat = {
        "prompt": [{"role": "user", "content": "<image>What?"}],
        "completion": [{"role": "assistant", "content": "This."}],
    }
    one, two = llava(
        [{"prompt": "<image>What?", "completion": "This.", "images": ["1.png"]}, chat | {"image": "1.png"}]
    )
    assert one.turns == two.turns
    assert [turn.text for turn in one.turns] == ["<image>What?", "This."]
    (lacking,) = llava([{"prompt": "<image>What?", "image": "1.png"}])
    assert "prompt and completion[1].content is not a string" in lacking.problem.detail


def test_a_system_text_beside_the_messages(llava):
    told = entry(image="1.png", system="Be short.")
    assert "system: drop or system: first_turn" in llava([told])[0].problem.detail
    assert llava([told], system="drop")[0].turns[0].text == "<image>\nWhat?"
    assert llava([told], system="first_turn")[0].turns[0].text.startswith("Be short.\n\n")
    assert llava([entry(image="1.png", system="")])[0].problem is None


def test_the_reader_is_the_one_of_its_type(tmp_path):
    config = LlavaSource(type="llava", annotations=str(tmp_path / "a"), images=str(tmp_path))
    assert isinstance(open_source(config)._source, Llava)


def test_the_kind_of_a_question_comes_from_the_entry(llava):
    two = {"conversations": conversation("<image>What?", "A dog.", "Is it?", "Yes.")}
    entries = [entry(image="1.png", kind="what"), entry("b", image="1.png", kind=["what", "yes"], **two)]
    entries += [
        entry(name, image="1.png", **kind) for name, kind in (("c", {}), ("d", {"kind": []}), ("e", {"kind": 3}))
    ]
    records = llava(entries, question_type="kind")
    assert [record.question_types for record in records[:2]] == [["what"], ["what", "yes"]]
    problems = [record.problem.detail for record in records[2:]]
    assert problems[0] == "kind is missing, expected a string, or a list of 1"
    assert all("kind is" in problem for problem in problems)
    assert llava(entries)[0].question_types is None
