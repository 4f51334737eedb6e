"""The report: true numbers, nothing executable however hostile the answers, examples and figures with a meaning."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.helpers.evaluations import HOSTILE, hostile, pope_rows, vqa_rows, write_evaluation
from workflows.evaluate.intervals import calibrate, calibration_of
from workflows.evaluate.plots import shorten
from workflows.evaluate.report import OTHER, answer_rows, best, confusion, cut, worst, write_report
from workflows.evaluate.results import table

TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "div",
    "b",
    "br",
    "dl",
    "dt",
    "dd",
    "ul",
    "li",
}
TAGS |= {"li", "details", "summary", "figure", "img", "table", "thead", "tbody", "tr", "th", "td", "span"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.attributes, self.sources, self.words, self._skip = set(), set(), [], [], False
        self.feed(content)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name == "src"]
        self._skip = tag == "style"

    def handle_data(self, data):
        if not self._skip:
            self.words.append(data)


def test_the_page_holds_the_scores_their_intervals_and_both_baselines(tmp_path):
    scores = write_evaluation(tmp_path, vqa_rows(), "gqa")
    files = write_report(tmp_path, tmp_path / "out", {"recipe": "quickstart", "version": "tiny/1"})
    page = Page(files[0].read_text())
    assert "tiny/1 on gqa" in page.text
    assert "Every expected question was answered exactly once" in page.text
    assert "180 about 60 images" in page.text
    assert "recipe quickstart" in page.text
    for name in ("overall", "colour", "shape"):
        line = rf"{name} [\d,]+ {scores['scores'][name]:.1%} (\d+\.\d) to (\d+\.\d) {scores['blind'][name]:.1%}"
        low, high = (float(end) for end in re.search(line, page.text).groups())
        assert low < 100 * scores["scores"][name] < high
    assert "always \u201cred\u201d" in page.text


def test_the_page_needs_nothing_else_and_the_figures_are_files_too(tmp_path):
    write_evaluation(tmp_path, vqa_rows(), "gqa")
    files = write_report(tmp_path, tmp_path / "out")
    content = files[0].read_text()
    page = Page(content)
    assert page.tags <= TAGS
    assert page.sources
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in page.sources)
    assert "http" not in content.replace("http-equiv", "")
    assert {file.name for file in files[1:]} == {"report-scores.png", "report-confusion.png", "report-answers.png"}
    for file in files[1:]:
        data = file.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert base64.b64encode(data).decode() in content


def test_hostile_text_stays_text(tmp_path):
    rows = [hostile(row) if number % 2 else row for number, row in enumerate(vqa_rows(images=12))]
    write_evaluation(tmp_path, rows, "gqa", model=HOSTILE, majority_answer=HOSTILE, notes=[HOSTILE])
    files = write_report(tmp_path, facts={"version": HOSTILE})
    page = Page(files[0].read_text())
    assert page.tags <= TAGS
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "<script>document.title" in page.text
    assert len(files[0].read_bytes()) < 1_500_000
    assert f"({len(HOSTILE) * 200:,} characters)" in page.text


def test_a_partial_evaluation_says_so(tmp_path):
    missing = {"count": 3, "ids": ["7", "8", "9"], "reasons": {"there is no image 7.png": 3}}
    write_evaluation(tmp_path, vqa_rows(images=8), "gqa", complete=False, missing=missing, notes=["not the whole set"])
    text = Page(write_report(tmp_path)[0].read_text()).text
    assert "Partial: these are not scores of the benchmark." in text
    assert "3 questions are missing (7, 8, 9)" in text
    assert "3: there is no image 7.png" in text
    assert "not the whole set" in text
    assert "Every expected question" not in text


def test_a_report_is_made_where_images_are_gone_or_were_never(tmp_path):
    rows = vqa_rows(images=8)
    rows = [replace(row, image=None) if row.image == "3.png" else row for row in rows]
    write_evaluation(tmp_path, rows, "gqa")
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"not an image")
    page = Page(write_report(tmp_path)[0].read_text())
    assert "the image cannot be read" in page.text
    assert "text only" in page.text


def test_yes_no_probabilities_get_a_reliability_diagram(tmp_path):
    rows = pope_rows()
    write_evaluation(tmp_path, rows, "pope")
    files = write_report(tmp_path)
    found = calibration_of(rows)
    text = Page(files[0].read_text()).text
    assert f"Expected calibration error {found.ece:.1%}, Brier score {found.brier:.3f}" in text
    assert "p(Yes)" in text
    assert "report-calibration.png" in {file.name for file in files}
    assert "that needed the image" not in text


def test_calibration_worked_by_hand():
    # 0.9 and 0.8 said of what is so once in two times; 0.2 of what is never so
    found = calibrate([0.95, 0.95, 0.85, 0.85, 0.2], [True, False, True, False, False])
    assert found.ece == pytest.approx((2 * 0.45 + 2 * 0.35 + 0.2) / 5)
    assert found.brier == pytest.approx((0.05**2 + 0.95**2 + 0.15**2 + 0.85**2 + 0.2**2) / 5)
    assert [b.items for b in found.bins] == [0, 0, 1, 0, 0, 0, 0, 0, 2, 2]
    assert calibrate([1.0, 0.0], [True, False]).ece == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate([1.2], [True])
    with pytest.raises(ValueError, match="one of each"):
        calibrate([0.5], [True, False])


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_has_not():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    outcome = rng.random(20_000) < p
    assert calibrate(p, outcome).ece < 0.01
    assert calibrate(np.where(p > 0.5, 0.99, 0.01), outcome).ece > 0.2


def test_wrong_examples_are_sure_ones_and_right_ones_needed_the_image():
    rows = pope_rows()
    chosen = worst(rows, 6)
    assert [row.score for row in chosen] == [0.0] * 6
    assert sorted(row.type for row in chosen[:3]) == ["adversarial", "popular", "random"]
    for kind in {row.type for row in chosen}:
        surest = max(abs(row.p_yes - 0.5) for row in rows if row.type == kind and not row.score)
        assert any(abs(row.p_yes - 0.5) == surest for row in chosen if row.type == kind)
    assert len({row.image for row in chosen}) == 6
    needed = best(vqa_rows(), 8)
    assert all(row.score == 1.0 and row.blind_score == 0.0 for row in needed)
    assert {row.type for row in needed} == {"colour", "shape"}
    assert worst([row for row in rows if row.score], 5) == []


def test_confusion_counts_every_answer_to_the_frequent_references_once():
    rows = vqa_rows()
    counts, references, answers = confusion(rows)
    assert sorted(references) == ["circle", "green", "red"]
    assert answers[-1] == OTHER
    assert counts.sum() == len(rows)
    assert counts[:, -1].sum() == sum(row.prediction == "blue" for row in rows)
    assert np.trace(counts[:, :3]) == sum(row.score for row in rows)
    captions = [replace(row, answer=f"caption {number}") for number, row in enumerate(rows)]
    assert confusion(captions) is None


def test_labels_and_texts_are_cut_and_say_so():
    assert shorten("two\nlines \x07") == "two lines \N{WHITE SQUARE}"
    assert len(shorten("x" * 99)) == 22
    assert shorten("  ") == "(nothing)"
    assert cut("short") == "short"
    assert cut("x" * 500).endswith("(500 characters)")


def test_every_reference_answer_has_its_recall_and_its_precision(tmp_path):
    rows = vqa_rows()
    write_evaluation(tmp_path, rows, "gqa")
    text = Page(write_report(tmp_path)[0].read_text()).text
    for answer in ("red", "green", "circle"):
        asked = [row for row in rows if row.answer == answer]
        hits = sum(row.prediction == answer for row in asked)
        blind = sum(row.blind_prediction == answer for row in asked)
        line = f"{answer} {len(asked)} {hits / len(asked):.1%} {blind / len(asked):.1%} 100.0%"
        assert line in text  # a wrong answer is "blue", so precision is whole
    assert answer_rows([replace(row, answer=row.id) for row in rows]) == []


def test_a_single_type_of_question_is_not_named_beside_overall(tmp_path):
    scores = write_evaluation(tmp_path, [replace(row, type="all") for row in vqa_rows(images=8)], "gqa")
    text = Page(write_report(tmp_path)[0].read_text()).text
    assert "overall 24" in text
    assert "all 24" not in text.replace("overall 24", "")
    lines = [line.split()[0] for line in table(scores).splitlines()[1:-1]]
    assert lines == ["overall"]
