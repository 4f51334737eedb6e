"""Looking into a data set: what is counted, what the text says, and what the contact sheet shows."""

import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from mlmamba.conversation import render
from mlmamba.image_layout import ImageLayout
from mlmamba.images import open_image
from pipelines import inspect
from pipelines.contact_sheet import IMAGE, LOSS, PLAIN, WRONG, _shortened, choose, draw_sheet, sample_of
from pipelines.inspect import histogram, inspect_data, report
from pipelines.packed import PackedDataset
from pipelines.sheet_text import Style, Typesetter
from tests.helpers.packed_set import TOKENS_PER_IMAGE, image_of, turns_of, write_packed_set

GREEN, RED = (0xBD, 0xF0, 0xC4), (0xD0, 0x10, 0x3A)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("set")
    write_packed_set(out, {"train": 20, "validation": 4})
    return str(out)


class TestInspect:
    def test_the_numbers(self, folder):
        content = inspect_data(folder)
        train = content["splits"]["train"]
        assert (train["samples"], train["rows"], train["shards"], train["records"]) == (20, 7, 4, 23)
        assert train["samples_by_source"] == {"captions": 10, "talk": 10}
        assert train["images_per_sample"]["bins"] == [
            {"from": 0, "to": 0, "count": 7},
            {"from": 1, "to": 1, "count": 7},
            {"from": 2, "to": 2, "count": 6},
        ]
        assert train["samples_per_row"]["bins"][-1] == {"from": 3, "to": 3, "count": 6}
        lengths = np.concatenate([np.bincount(row.seq_idx) for row in PackedDataset(folder).rows(np.arange(7))])
        tokens = train["tokens_per_sample"]
        assert (tokens["least"], tokens["most"]) == (lengths.min(), lengths.max())
        assert sum(part["count"] for part in tokens["bins"]) == len(lengths) == 20
        assert sum(lengths) == train["tokens"]
        assert content["quarantine"] == [
            {
                "split": "train",
                "source": "captions",
                "reason": "image_missing",
                "records": 2,
                "example": {"id": "bad-0", "detail": "no file 0.png"},
            },
            {
                "split": "train",
                "source": "talk",
                "reason": "empty_turn",
                "records": 1,
                "example": {"id": "bad-2", "detail": "turn 1 (assistant) is empty"},
            },
        ]
        assert json.loads(json.dumps(content)) == content

    def test_a_large_set_is_sampled_and_the_text_says_so(self, folder, monkeypatch):
        monkeypatch.setattr(inspect, "ROWS", 3)
        content = inspect_data(folder)
        assert content["splits"]["train"]["rows_counted"] == 3
        assert sum(part["count"] for part in content["splits"]["train"]["samples_per_row"]["bins"]) == 3
        assert "train: samples per row (from 3 of 7 rows): least" in report(content)

    def test_the_text_is_aligned_and_complete(self, folder):
        lines = report(inspect_data(folder)).splitlines()
        table = lines[5 : lines.index("", 5)]
        assert table[0].split() == ["train", "validation"]
        assert len({len(line) for line in table}) == 1
        facts = {line[: -len("  train  validation")].strip(): line.split()[-2:] for line in table[1:]}
        assert facts["samples"] == ["20", "4"]
        assert facts["set aside"] == ["3", "0"]
        bars = [line for line in lines if line.startswith("  captions")]
        assert bars[0].split() == ["captions", "10", "50.0%", "#" * 40]
        assert any("image_missing" in line and "bad-0: no file 0.png" in line for line in lines)

    def test_counts_that_this_version_does_not_know_are_shown(self, folder):
        content = inspect_data(folder)
        content["splits"]["train"] |= {"stretched": 1234, "stretched_by_source": {"talk": 1234}}
        text = report(content)
        assert any(line.split() == ["stretched", "1,234", "0"] for line in text.splitlines())
        assert "train: stretched by source" in text

    def test_histogram_has_round_edges_and_loses_nothing(self):
        numbers = np.random.default_rng(0).integers(17, 4097, 5000)
        bins = histogram(numbers)
        assert sum(part["count"] for part in bins) == 5000
        assert {part["to"] - part["from"] + 1 for part in bins} == {500}
        assert bins[0]["from"] == 0
        assert bins[-1]["to"] == 4499
        assert histogram(np.array([7])) == [{"from": 7, "to": 7, "count": 1}]

    def test_no_data_set(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not finished"):
            inspect_data(str(tmp_path))


class TestSamples:
    def test_text_and_loss_are_those_of_the_conversation(self, folder):
        for sample in choose(folder, "train", 20, 0):
            i = int(sample.id.split("-")[1])
            name = "<image\u00a0{}x\u00a04>".format
            shown = render([*turns_of(i)], "<|endoftext|>")
            for number in range(1, i % 3 + 1):
                shown = shown.replace("<image>", name("" if i % 3 == 1 else f"{number}\u00a0"), 1)
            assert "".join(text for text, _ in sample.pieces) == shown
            answers = [f"{turn.text}<|endoftext|>" for turn in turns_of(i) if turn.role == "assistant"]
            assert [text for text, kind in sample.pieces if kind == LOSS] == answers
            assert {kind for _, kind in sample.pieces} <= {LOSS, PLAIN, IMAGE}
            assert sample.images == [image_of(i)] * (i % 3)

    def test_the_choice_has_every_kind_and_is_repeatable(self, folder):
        chosen = choose(folder, "train", 6, 0)
        assert {(sample.source, len(sample.images)) for sample in chosen} == {
            (source, images) for source in ("talk", "captions") for images in (0, 1, 2)
        }
        assert choose(folder, "train", 6, 0) == chosen
        assert choose(folder, "train", 6, 1) != chosen
        assert len(choose(folder, "validation", 50, 0)) == 4

    def test_a_wrong_label_or_length_of_an_image_is_marked(self, folder):
        dataset = PackedDataset(folder)
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
        row = dataset[0]  # its second sample shows one image
        first = int(np.flatnonzero(row.seq_idx == 1)[0])
        labels, ids = row.labels.copy(), row.input_ids.copy()
        answer = first + int(np.flatnonzero(labels[first:] != -100)[0])
        labels[answer] += 1
        ids[first + TOKENS_PER_IMAGE - 1] = ids[answer]
        changed = row.__class__(**{**row.__dict__, "labels": labels, "input_ids": ids})
        kinds = [
            (text, kind) for text, kind in sample_of(changed, 0, 1, tokenizer, ImageLayout(TOKENS_PER_IMAGE)).pieces
        ]
        assert kinds[0] == ("<image\u00a0x\u00a03>", WRONG)
        assert [kind for _, kind in kinds].count(WRONG) == 2


class TestSheet:
    def test_it_is_a_png_with_loss_in_green_and_nothing_in_red_but_the_legend(self, folder, tmp_path):
        result = draw_sheet(folder, str(tmp_path / "new" / "sheet.png"), count=6)
        assert result == {
            "sheet": str(tmp_path / "new" / "sheet.png"),
            "samples": 6,
            "characters_without_font": {},
        }
        sheet = np.asarray(Image.open(result["sheet"]))
        cards = sheet[130:]
        assert (cards == GREEN).all(-1).sum() > 5000
        assert not (cards == RED).all(-1).any()
        assert (sheet[:130] == RED).all(-1).any()
        assert draw_sheet(folder, str(tmp_path / "again.png"), count=6)["samples"] == 6
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "new" / "sheet.png").read_bytes()

    def test_images_are_square_as_the_model_gets_them(self, folder, tmp_path):
        draw_sheet(folder, str(tmp_path / "sheet.png"), count=2)
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        colours = [np.asarray(open_image(image_of(i)))[0, 0] for i in range(20)]
        shown = [(sheet == colour).all(-1) for colour in colours]
        widths = [(int(place.any(0).sum()), int(place.any(1).sum())) for place in shown if place.sum() > 10_000]
        assert widths
        assert all(size == (224, 224) for size in widths)

    def test_a_damaged_image_does_not_stop_the_sheet(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("tests.helpers.packed_set.image_of", lambda i: b"not an image")
        write_packed_set(tmp_path / "set", {"train": 3})
        draw_sheet(str(tmp_path / "set"), str(tmp_path / "sheet.png"))
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        assert (sheet[130:] == RED).all(-1).sum() > 10_000


class TestTypesetter:
    def text(self, text: str, width: int = 300) -> list[str]:
        lines = Typesetter(15).lines([(text, Style())], width)
        return ["".join(part for word in line for part, _ in word.parts) for line in lines]

    def test_lines_hold_all_text_and_fit(self):
        text = "some words, averyveryveryveryveryveryveryveryveryveryverylongone and \u4e00\u4e8c\u4e09\nnew line"
        setter = Typesetter(15)
        lines = setter.lines([(text, Style())], 200)
        assert all(sum(word.width for word in line) <= 210 for line in lines)
        assert "".join(self.text(text, 200)) == text.replace("\n", "")
        assert self.text("one\n\ntwo") == ["one", "", "two"]

    def test_ideographs_break_anywhere(self):
        assert len(self.text("\u4e2d" * 40, 150)) >= 4

    @pytest.mark.parametrize("after", ["", " and Latin"])
    def test_right_to_left_words_stand_in_their_order(self, after):
        image = Image.new("RGB", (400, 30), "white")
        first, second = "\u05d0" * 3, "\u05d1" * 9  # the first word belongs to the right of the second
        setter = Typesetter(15)
        pieces = [(first, Style(paper="#ff0000")), (" 3 ", Style()), (second, Style(paper="#00ff00")), (after, Style())]
        setter.draw(image, (0, 0), setter.lines(pieces, 400))
        pixels = np.asarray(image).astype(int)
        red = np.flatnonzero((pixels == (255, 0, 0)).all(-1).any(0))
        green = np.flatnonzero((pixels == (0, 255, 0)).all(-1).any(0))
        assert green.max() < red.min()

    def test_characters_without_a_font_are_counted(self):
        setter = Typesetter(15)
        setter.lines([("a \U00013000 b \ue000", Style())], 300)  # a hieroglyph; a private character
        assert sum(setter.missing.values()) >= 1
        assert set(setter.missing) <= {"Egyptian", "symbol", "Unknown"}

    def test_what_is_cut_from_a_card_is_said(self):
        setter = Typesetter(15)
        lines = setter.lines([("\n".join(str(i) for i in range(100)), Style())], 300)
        short = _shortened(lines, setter)
        assert len(short) == 24
        assert "".join(part for word in short[16] for part, _ in word.parts) == "... 77 lines are not shown ..."
