"""How VQA-style answers are made comparable, and how one answer is scored against those of ten people.

The rules are those of VQA's evaluation code (visualqa.org, "evaluation"; GT-Vision-Lab/VQA, vqaEval.py), which the
evaluators of VizWiz and TextVQA (M4C) took over:

1. newlines and tabs become spaces; outer space goes;
2. each of 21 marks is dropped, if it stands beside a space anywhere in the text or the text has a comma between digits;
   else it becomes a space. A full stop that no digit follows is dropped (of those, the first 32: the published code
   passes a flag in the place of a count);
3. lower case; number words, none to ten, become digits; a, an and the go; contractions get a lost apostrophe back.

TextVQA's evaluator first lowers the case, drops commas and question marks, and parts 's from its word.

Accuracy (visualqa.org): min(number of people who said it / 3, 1), averaged over all choices of all people but one.

Where published code differs from these rules, and from each other. Ours normalises both sides, always:

- GT-Vision-Lab/VQA leaves both sides as they are when all ten people agree, so "Yes" is wrong where ten said "yes".
  `script_score` is that rule to the letter; VQAv2 reports it as "script" beside its score.
- lmms-eval (vqav2) normalises both sides, always, like ours. Its vizwiz task adds TextVQA's first step, ours does not.
- TRI-ML/vlm-evaluation (vizwiz, vqav2) normalises the prediction alone, so a reference with an article never matches.
- VizWiz's original code leaves one person out by comparing entries, and entries of VizWiz have no id: it leaves out
  everybody who gave the same answer with the same confidence. Ours leaves out one.
- M4C (llava-torch) scores like `leave_one_out`, and demands exactly ten answers.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

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
