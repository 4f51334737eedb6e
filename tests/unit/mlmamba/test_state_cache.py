"""The cache of states: what is found again and for whom, what goes first, and how much memory it takes."""

import random

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mlmamba.conversation import Turn
from mlmamba.processing import MLMambaProcessor
from mlmamba.state import LayerState, MambaState
from mlmamba.state_cache import Place, Places, StateCache, digests, image_digest, size_of
from tests.helpers.images import image
from tests.helpers.tiny import IMAGE_ID, NEOX, NO_NEOX, PER_IMAGE, SIDE, tiny_tokenizer


def state(value=1.0, width=64):
    return MambaState([LayerState(torch.full((1, 3, 4), value), torch.full((1, 2, 2, width), value))])


SIZE = size_of(state())


def place(name, length=1):
    return Place(length, name.encode())


def keep(cache, name, cost=1.0, after=None, owner="a", **given):
    return cache.keep(owner, name.encode(), state(), cost, None if after is None else after.encode(), **given)


def names(cache):
    return sorted(digest.decode() for _, digest in cache._kept)


@pytest.fixture(scope="module")
def processor():
    return MLMambaProcessor(tiny_tokenizer(), SIDE, PER_IMAGE, 4000)


def places_of(processor, turns, images=()):
    ids = processor.tokenize([processor.prompt(turns)])["input_ids"][0].tolist()
    return ids, Places(processor).of(ids, images)


def test_the_longest_state_is_found_and_only_by_its_owner():
    cache = StateCache(10 * SIZE)
    keep(cache, "image"), keep(cache, "turn", after="image")
    places = [place("image", 4), place("turn", 9), place("end", 12)]
    assert cache.longest("a", places, 12) == places[1]
    assert cache.longest("a", places[:1], 12) == places[0]
    assert cache.longest("b", places, 12) is None
    assert float(cache.use("a", places[1]).state.layers[0].ssm.mean()) == 1


def test_a_whole_prompt_is_found_only_with_the_logits_that_follow():
    cache = StateCache(10 * SIZE)
    keep(cache, "end")
    assert cache.longest("a", [place("end", 12)], 12) is None
    keep(cache, "end", logits=torch.arange(5.0))
    assert cache.longest("a", [place("end", 12)], 12) is not None
    keep(cache, "end")  # what is known already is not lost
    assert cache.use("a", place("end")).logits.tolist() == [0, 1, 2, 3, 4]
    assert len(cache) == 1


def test_out_goes_what_costs_least_to_make_again_and_of_equals_the_one_not_used_for_longest():
    cache = StateCache(3 * SIZE)
    keep(cache, "dear", cost=100), keep(cache, "old"), keep(cache, "used")
    cache.use("a", place("old"))
    keep(cache, "new")
    assert names(cache) == ["dear", "new", "old"]
    keep(cache, "next")
    assert names(cache) == ["dear", "new", "next"]


def test_what_was_dear_and_is_not_used_any_more_goes_in_the_end():
    cache = StateCache(4 * SIZE)
    keep(cache, "dear", cost=20)
    for number in range(200):
        keep(cache, f"{number:03}")
    assert "dear" not in names(cache)


def test_a_state_leaves_its_cost_to_those_that_were_read_on_from_it():
    """A conversation's newest state is worth all that it would take to read the conversation again."""
    cache = StateCache(3 * SIZE)
    keep(cache, "image", cost=50), keep(cache, "one", after="image"), keep(cache, "two", after="one")
    keep(cache, "other", cost=40)
    assert names(cache) == ["image", "other", "two"]  # "one" is the cheapest
    assert cache._kept["a", b"two"].cost == 2
    assert cache._kept["a", b"two"].parent == ("a", b"image")
    keep(cache, "more", cost=60)
    keep(cache, "most", cost=70)
    assert all(cache._kept[key].children <= cache._kept.keys() for key in cache._kept)


def test_children_of_a_state_that_went_can_go_too():
    chance = random.Random(0)
    cache = StateCache(7 * SIZE)
    seen: list[str] = []
    for number in range(500):
        name = f"{number:04}"
        keep(cache, name, chance.randrange(1, 50), chance.choice(seen) if seen else None)
        seen.append(name)
        if chance.random() < 0.3:
            cache.use("a", place(chance.choice(names(cache))))
        assert cache.nbytes == sum(kept.nbytes for kept in cache._kept.values()) <= cache.limit
        for key, kept in cache._kept.items():
            assert kept.parent is None or kept.parent not in cache._kept or key in cache._kept[kept.parent].children
            assert kept.children <= cache._kept.keys()
    assert len(cache) == 7
    assert len(cache._heap) < 200


def test_a_limit_under_one_state_keeps_none():
    cache = StateCache(SIZE - 1)
    assert not keep(cache, "state")
    assert (len(cache), cache.nbytes) == (0, 0)
    assert keep(StateCache(SIZE), "state")


def test_a_closed_cache_is_empty_and_stays_so():
    cache = StateCache(10 * SIZE)
    keep(cache, "state")
    cache.close()
    assert cache.longest("a", [place("state")], 5) is None
    assert not keep(cache, "state")
    assert cache.nbytes == 0


def test_digests_tell_tokens_images_and_their_order_apart():
    one, other = image_digest(np.zeros((3, 4, 4), np.uint8)), image_digest(np.ones((3, 4, 4), np.uint8))
    assert image_digest(np.zeros((3, 2, 8), np.uint8)) != one
    ids = [5, 1, 1, 6, 1, 1, 7]
    whole = digests(ids, [3, 6, 7], [one, other], 1)
    assert len({*whole}) == 3
    assert whole[:1] == digests(ids[:4], [3], [one], 1)  # the second image comes later
    assert whole[0] != digests(ids[:4], [3], [other], 1)[0]
    assert whole[1] != digests(ids, [6], [other, one], 1)[0]
    assert whole[1] != digests([5, 1, 1, 8, 1, 1, 7], [6], [one, other], 1)[0]
    assert digests(ids, [7], [one, other], 1) == whole[2:]
    assert digests([5, 6], [2], [], 1) != digests([5, 6 + 2**32], [2], [], 1)


def test_places_are_after_images_and_where_answers_begin_and_end(processor):
    first = [Turn("user", "what?", 2)]
    turns = [*first, Turn("assistant", "red"), Turn("user", "sure?", 1)]
    ids, places = places_of(processor, turns, [b"1", b"2", b"3"])
    cuts = [place.length for place in places if place.cut]
    beginning = processor.tokenize([processor.prompt(first)])["input_ids"].shape[1]
    ends = [i for i, token in enumerate(ids) if token == processor.tokenizer.eos_token_id]
    shown = [i + 1 for i, token in enumerate(ids) if token == IMAGE_ID]
    assert cuts == [2 * PER_IMAGE, shown[-1], len(ids)]
    assert sorted(place.length for place in places) == sorted({*cuts, beginning, ends[1] - 1, ends[1], ends[1] + 1})
    before = places_of(processor, first, [b"1", b"2"])[1]
    assert {place.digest for place in before} <= {place.digest for place in places}
    assert not {place.digest for place in places} & {p.digest for p in places_of(processor, first, [b"1", b"3"])[1][1:]}


def test_an_empty_answer_and_a_question_without_text_have_their_places(processor):
    turns = [Turn("user", "", 1), Turn("assistant", ""), Turn("user", "go on")]
    ids, places = places_of(processor, turns, [b"1"])
    lengths = [place.length for place in places]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == len(ids)
    assert PER_IMAGE in lengths


def test_long_instructions_have_a_place_that_all_questions_after_them_share(processor):
    text = "You are a careful observer.\nAnswer with one word."
    found = []
    for question in ("what?", " x", "\nwhere is it?"):
        turn = Turn("user", f"{text}\n\n{question}", 1, len(text))
        ids = processor.tokenize([processor.prompt([turn])])["input_ids"][0].tolist()
        places = Places(processor).of(ids, [b"1"], turn)
        (place,) = [place for place in places if place.cut and PER_IMAGE < place.length < len(ids)]
        assert processor.tokenizer.decode(ids[PER_IMAGE : place.length]) == f"<|user|>\n{text}"
        found.append(place)
    assert len({*found}) == 1
    short = Turn("user", "Be brief.\n\nwhat?", 1, len("Be brief."))
    ids = processor.tokenize([processor.prompt([short])])["input_ids"][0].tolist()
    assert Places(processor).of(ids, [b"1"], short) == Places(processor).of(ids, [b"1"])


@pytest.mark.skipif(not NEOX.exists(), reason=NO_NEOX)
@pytest.mark.parametrize(
    "text",
    ["Answer in one word. " * 9, "Be kind " * 20 + "<image>", "1 " * 40, "a\n" * 40],
    ids=["sentences", "placeholder", "digits", "lines"],
)
def test_a_real_tokenizer_gives_instructions_a_place(text):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(NEOX), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor, found = MLMambaProcessor(tokenizer, SIDE, PER_IMAGE, 4000), set()
    for question in ("what?", "2 + 2", "  so", "<image>"):
        turn = Turn("user", f"{text}\n\n{question}", 1, len(text))
        ids = processor.tokenize([processor.prompt([turn])])["input_ids"][0].tolist()
        found |= {p for p in Places(processor).of(ids, [b"1"], turn) if p.cut and PER_IMAGE < p.length < len(ids)}
    assert len(found) == 1


@pytest.mark.parametrize("size", [1, 7])
def test_memory_stays_under_its_limit_after_ten_thousand_images(size):
    """Every image a state of its own, of a model so small that Python's own objects weigh most."""
    layers = [LayerState(torch.zeros(1, 3, 40), torch.zeros(1, 4, 8, 8)) for _ in range(size)]
    cache, process = StateCache(6 * 2**20), psutil.Process()
    pixels = np.asarray(image(0).resize((SIDE, SIDE)))

    def shown(number):
        pixels.flat[:4] = list(number.to_bytes(4, "little"))
        digest = image_digest(pixels)
        cache.keep("a", digest, MambaState(layers).select(torch.tensor([0])), 8, None, torch.zeros(300))

    pixels = pixels.copy()
    for number in range(2000):
        shown(number)
    before = process.memory_info().rss
    for number in range(2000, 10_000):
        shown(number)
    assert cache.nbytes <= cache.limit
    assert process.memory_info().rss - before < cache.limit
