"""VQAv2 and VizWiz, whose questions have the answers of ten people each.

VQAv2's val split (visualqa.org): 214,354 questions about 40,504 images of COCO.

    v2_OpenEnded_mscoco_val2014_questions.json   {"info", "questions": [{question_id, image_id, question}]}
    v2_mscoco_val2014_annotations.json           {"annotations": [{question_id, answer_type, answers: [{answer}]}]}
    val2014/COCO_val2014_000000000042.jpg        images, in a folder or in val2014.zip

VizWiz's val split (vizwiz.org, VQA): 4,319 questions that blind people asked about their own images.

    val.json                     [{image, question, answers: [{answer, answer_confidence}], answer_type, answerable}]
    val/VizWiz_val_00000000.jpg  images, in a folder or in val.zip

An entry of VizWiz has no id; its image's name is one. Unanswerability takes "unanswerable", after normalising, as the
claim that a question cannot be answered: average precision and F1 of that claim, as VizWiz's script computes them from
predictions of 0 and 1.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from workflows.errors import UsageError, WorkflowError
from workflows.evaluate.benchmarks.base import SHORT_ANSWER, Benchmark, Files, Item, Score, ids_text
from workflows.evaluate.statistics import average_precision, mean, precision_recall_f1

PEOPLE = 10
_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


class TenAnswers(Benchmark):
    """A benchmark whose questions were answered by ten people each."""

    def people(self, answers: object, item_id: str) -> list[str]:
        """The ten answers, which are strings or {"answer": ...} objects.

        Raises:
            WorkflowError: there are not ten of them.
        """
        entries = answers if isinstance(answers, list) else []
        texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
        if len(texts) != PEOPLE or not all(isinstance(text, str) for text in texts):
            raise WorkflowError(
                f"{self.name}: question {item_id} has {len(texts)} answers, expected {PEOPLE}: the scores leave one "
                "person out of ten. Is the file of another version, or of a split without answers?"
            )
        return texts

    def match(self, questions: Mapping[str, object], annotations: Mapping[str, object]) -> None:
        """Raise WorkflowError unless questions and annotations have the same ids."""
        without = [key for key in questions if key not in annotations]
        unknown = [key for key in annotations if key not in questions]
        if without or unknown:
            raise WorkflowError(
                f"{self.name}: the files do not belong together: {ids_text(without, 'questions')} have no answers, "
                f"{ids_text(unknown, 'annotations')} are of unknown questions"
            )


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(i) for i, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}

# The contractions of the published table; a word becomes one of them when it lacks exactly one apostrophe.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRED = {
    full[:i] + full[i + 1 :]: full for full in _CONTRACTIONS.split() for i, letter in enumerate(full) if letter == "'"
}
_REPAIRED["somebody'd"] = "somebodyd"  # the published table has this one the wrong way round


def normalise_vqa(answer: str) -> str:
    """An answer by VQA's rules."""
    return _words(_marks(answer.replace("\n", " ").replace("\t", " ").strip()))


@lru_cache(maxsize=1 << 16)  # ten people's answers repeat a lot
def normalise_m4c(answer: str) -> str:
    """An answer by the rules of TextVQA's evaluator."""
    return normalise_vqa(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


_normalise_vqa_kept = lru_cache(maxsize=1 << 16)(normalise_vqa)


def leave_one_out(matches: int, people: int = 10) -> float:
    """Accuracy of an answer that `matches` of `people` gave.

    Leaving out one who gave it leaves matches - 1 of them, leaving out another leaves all.

    Raises:
        ValueError: there are no people.
    """
    if not 0 <= matches <= people or not people:
        raise ValueError(f"{matches} of {people} people cannot have given an answer")
    given, others = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * given + (people - matches) * others) / people


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of a prediction by VQA's rules, both sides normalised."""
    said = normalise_vqa(prediction)
    return leave_one_out(sum(_normalise_vqa_kept(answer) == said for answer in answers), len(answers))


def m4c_score(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of a prediction by TextVQA's evaluator."""
    said = normalise_m4c(prediction)
    return leave_one_out(sum(normalise_m4c(answer) == said for answer in answers), len(answers))


def script_score(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of a prediction as VQA's published script has it: raw where all people agree (see above)."""
    raw = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(raw)) > 1:
        return vqa_score(prediction, answers)
    said = prediction.replace("\n", " ").replace("\t", " ").strip()
    return leave_one_out(raw.count(said), len(raw))


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most people gave, the first of several."""
    return Counter(answers).most_common(1)[0][0]


def _marks(text: str) -> str:
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if drop_all or beside_space else " ")
    return _FULL_STOP.sub("", out, count=_MOST_FULL_STOPS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


class VQAv2(TenAnswers):
    """Leave-one-out accuracy over ten people's answers, by answer type; "script" is the published script's figure."""

    name = "vqav2"
    published = (214_354,)
    taken = ("script",)

    def read(self, data: str, images: str | None) -> list[Item]:
        files = Files(self.name, data)
        head = files.object(_QUESTIONS, files.json(_QUESTIONS, f"Questions/{_QUESTIONS}"))
        version = str((head.get("info") or {}).get("version", "2.0"))
        if not version.startswith("2"):
            raise UsageError(f"{self.name}: the questions are of version {version}, expected 2.0")
        body = files.object(_ANNOTATIONS, files.json(_ANNOTATIONS, f"Annotations/{_ANNOTATIONS}"))
        questions = self._by_id(self.need(head, "questions", list, "the questions file"))
        annotations = self._by_id(self.need(body, "annotations", list, "the annotations file"))
        self.match(dict(questions), dict(annotations))
        answered = dict(annotations)
        subset = str(head.get("data_subtype", "val2014"))
        places = [f"{place}{subset}" for place in ("", "images/", "Images/", "Images/mscoco/")]
        folders = files.images(images, *places, f"{subset}.zip")
        self.digest = files.digest
        return self.place((self._item(key, entry, answered[key], subset) for key, entry in questions), folders)

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        return Score(vqa_score(prediction, item.answers), script_score(prediction, item.answers))

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        return super().measure(table, weights) | {"script": mean(table["text_score"], weights)}

    def _by_id(self, entries: list) -> list[tuple[str, dict]]:
        return [(str(self.need(entry, "question_id", int, "an entry")), entry) for entry in entries]

    def _item(self, key: str, entry: dict, annotation: dict, subset: str) -> tuple[Item, str]:
        question = self.need(entry, "question", str, f"question {key}")
        image = self.need(entry, "image_id", int, f"question {key}")
        answers = self.people(annotation.get("answers"), key)
        kind = self.need(annotation, "answer_type", str, f"annotation {key}")
        item = Item(key, question, f"{question}\n{SHORT_ANSWER}", answers, most_frequent(answers), kind)
        return item, f"COCO_{subset}_{image:012d}.jpg"


_UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."
UNANSWERABLE = "unanswerable"


class VizWiz(TenAnswers):
    """Leave-one-out accuracy over ten people's answers, also of answerable and unanswerable ones; unanswerability."""

    name = "vizwiz"
    published = (4_319,)
    taken = ("answerable_only", "unanswerable_only", "unanswerability")

    def read(self, data: str, images: str | None) -> list[Item]:
        files = Files(self.name, data)
        entries = files.json_lines("val.json", "Annotations/val.json", "annotations/val.json")
        folders = files.images(images, "val", "Images/val", "images/val", "images", "val.zip")
        self.digest = files.digest
        return self.place((self._item(entry) for entry in entries), folders)

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        claimed = normalise_vqa(prediction) == UNANSWERABLE
        return Score(vqa_score(prediction, item.answers), text_yes=float(claimed))

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        answerable = table["answerable"] > 0
        positive, claimed = 1.0 - table["answerable"], table["text_yes"]
        precision, recall, f1 = precision_recall_f1(positive, claimed, weights)
        return super().measure(table, weights) | {
            "answerable_only": mean(table["score"][answerable], weights[answerable]),
            "unanswerable_only": mean(table["score"][~answerable], weights[~answerable]),
            "unanswerability/ap": average_precision(positive, claimed, weights),
            "unanswerability/f1": f1,
            "unanswerability/precision": precision,
            "unanswerability/recall": recall,
        }

    def _item(self, entry: dict) -> tuple[Item, str]:
        image = self.need(entry, "image", str, "an entry")
        question, kind = (self.need(entry, key, str, image) for key in ("question", "answer_type"))
        answerable = int(self.need(entry, "answerable", int, image))
        answers = self.people(entry.get("answers"), image)
        prompt = f"{question}\n{_UNSURE}\n{SHORT_ANSWER}"
        details = {"answerable": answerable}
        return Item(image, question, prompt, answers, most_frequent(answers), kind, details=details), image
