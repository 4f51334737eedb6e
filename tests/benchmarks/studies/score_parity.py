"""How far our scorers agree with other implementations, on random and on adversarial answers.

    pip install --no-deps --target OUTSIDE llava-torch lmms-eval loguru tqdm
    python -m tests.benchmarks.studies.score_parity --outside OUTSIDE [--vqa-script vqaEval.py] [--answers 20000]

Only the scorers' own modules of these packages are run, so nothing else of theirs has to be installed. `--vqa-script`
names VQA's own script (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py), which is on no index.

A row is one scorer of ours beside one of theirs: answers, how many agree to 1e-9, and the first that does not. Rows
with a reason behind them are known to differ; workflows/evaluate/benchmarks/vqav2.py says why.
"""

import argparse
import ast
import importlib.util
import random
import re
import string
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from workflows.evaluate.benchmarks.gqa import normalise_gqa
from workflows.evaluate.benchmarks.vqav2 import m4c_score, script_score, vqa_score

Scorer = Callable[[str, list[str]], float]
PEOPLE = 10
_WORDS = """
    yes no Yes NO red Blue two ten none None zero a an the The A dont don't cant wont Im couldnt've couldn'tve yall'll
    somebody'd somebody'dve 'ow'sat oclock maam its it's nokia Nokia's t-shirt U.S.A. 3.5 1,000 10,000,000 2. .5 7:30
    50% $5 a.m. and/or "quoted" (in) [brackets] {x} =+ \\ _ < > @ ` ! ? ; unanswerable Unanswerable é Straße 日本 ß İ
"""
_JOINS = (" ", " ", " ", "  ", "\n", "\t", "", ",", ", ", ".", "-", "/", "'s ", "? ", " ?", "!")


def answers(count: int, seed: int = 7) -> Iterator[tuple[str, list[str]]]:
    """Predictions with the answers of ten people: of odd words, joined in odd ways, near to each other or far.

    A tenth are as plain as people's answers are; some are empty, some very long, in some all people agree.
    """
    rng = random.Random(seed)
    words = _WORDS.split()

    def phrase() -> str:
        length = rng.choice([1, 1, 1, 2, 2, 3, 5, 0, 40 if rng.random() < 0.05 else 2])
        if length == 0 and rng.random() < 0.2:
            return rng.choice(["", " ", ".", "." * 50, "a", "\n"])
        return "".join(rng.choice(words) + rng.choice(_JOINS) for _ in range(max(length, 1)))

    def near(text: str) -> str:
        changes = (str.lower, str.upper, str.strip, lambda t: f"a {t}", lambda t: f"{t}.", lambda t: t.replace("'", ""))
        return rng.choice((*changes, lambda t: t.replace(" ", ", "), lambda t: t.replace("two", "2"), lambda t: t))(
            text
        )

    for _ in range(count):
        prediction = rng.choice(words) if rng.random() < 0.1 else phrase()
        pool = [near(prediction), near(prediction), phrase(), rng.choice(words)]
        same = rng.random() < 0.15
        people = [rng.choice(pool)] * PEOPLE if same else rng.choices(pool, weights=[2, 1, 3, 2], k=PEOPLE)
        yield prediction, people


def find_m4c(outside: Path | None) -> Scorer | None:
    """TextVQA's evaluator that llava-torch ships, or None."""
    file = _file("llava-torch", "llava/eval/m4c_evaluator.py", outside)
    if file is None:
        return None
    evaluator = _load("outside_m4c", file).TextVQAAccuracyEvaluator()

    def score(prediction: str, people: list[str]) -> float:
        said = evaluator.answer_processor(prediction)
        return evaluator._compute_answer_scores(people).get(said, 0.0)

    return score


def find_lmms_eval(outside: Path | None) -> dict[str, Scorer]:
    """lmms-eval's scorers of vqav2, textvqa, vizwiz_vqa and gqa by task; empty without the package."""
    root = _file("lmms-eval", "lmms_eval/__init__.py", outside)
    if root is None:
        return {}
    for name, folder in {"lmms_eval": root.parent, "lmms_eval.tasks": root.parent / "tasks"}.items():
        package = types.ModuleType(name)  # their own __init__ would import every task
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    found: dict[str, Scorer] = {}
    tasks = {"vqav2": dict, "textvqa": str, "vizwiz_vqa": str}
    for task, form in tasks.items():
        module = importlib.import_module(f"lmms_eval.tasks.{task}.utils")
        process = getattr(module, f"{task}_process_results")

        def score(prediction: str, people: list[str], process=process, form=form) -> float:
            entries = [{"answer": a, "answer_id": i} if form is dict else a for i, a in enumerate(people)]
            return process({"answers": entries, "question_id": 0}, [prediction])["exact_match"]

        found[task] = score
    exact = _function(root.parent / "api" / "metrics.py", "exact_match_hf_evaluate")

    def gqa(prediction: str, people: list[str]) -> float:
        made = exact([prediction], [people[0]], ignore_case=True, ignore_punctuation=True)
        return float(made["exact_match"])

    return found | {"gqa": gqa}


def read_vqa_script(file: Path) -> Scorer:
    """VQA's own script, whose print statements are made calls."""
    code = re.sub(r'print ("[^"\n]*")', r"print(\1)", file.read_text())
    module = types.ModuleType("outside_vqa")
    exec(compile(code, str(file), "exec"), module.__dict__)
    module.print = lambda *_: None

    class Answers:
        def __init__(self, qa):
            self.qa = qa

        def getQuesIds(self):
            return list(self.qa)

    def score(prediction: str, people: list[str]) -> float:
        entries = [{"answer": answer, "answer_id": i} for i, answer in enumerate(people)]
        asked = Answers({0: {"answers": entries, "question_type": "x", "answer_type": "x"}})
        evaluation = module.VQAEval(asked, Answers({0: {"answer": prediction}}), n=12)
        evaluation.updateProgress = lambda progress: None
        evaluation.evaluate()
        return evaluation.evalQA[0] / 100

    return score


def compare(ours: Scorer, theirs: Scorer, cases: list[tuple[str, list[str]]]) -> tuple[int, str]:
    """How many answers get the same score, and the first that does not."""
    agreed, first = 0, ""
    for prediction, people in cases:
        mine, other = ours(prediction, people), theirs(prediction, people)
        agreed += abs(mine - other) < 1e-9
        if abs(mine - other) >= 1e-9 and not first:
            first = f"{prediction!r} for {sorted(set(people))}: {mine:.2f} and {other:.2f}"
    return agreed, first


def gqa_score(prediction: str, people: list[str]) -> float:
    """Our exact match with the first answer."""
    return float(normalise_gqa(prediction) == normalise_gqa(people[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outside", type=Path, help="folder that the packages were installed into with --target")
    parser.add_argument("--vqa-script", type=Path)
    parser.add_argument("--answers", type=int, default=20_000)
    a = parser.parse_args()
    cases = list(answers(a.answers))
    lmms = find_lmms_eval(a.outside)
    rows: list[tuple[str, Scorer, str, Scorer | None, str]] = [
        ("m4c_score (textvqa)", m4c_score, "llava-torch M4C", find_m4c(a.outside), ""),
        ("m4c_score (textvqa)", m4c_score, "lmms-eval textvqa", lmms.get("textvqa"), ""),
        ("vqa_score (vqav2)", vqa_score, "lmms-eval vqav2", lmms.get("vqav2"), ""),
        ("vqa_score (vizwiz)", vqa_score, "lmms-eval vizwiz_vqa", lmms.get("vizwiz_vqa"), "it normalises as TextVQA"),
        ("normalise_gqa (gqa)", gqa_score, "lmms-eval gqa", lmms.get("gqa"), "it keeps outer space"),
    ]
    if a.vqa_script:
        script = read_vqa_script(a.vqa_script)
        rows.append(("script_score (vqav2)", script_score, "VQA's script", script, ""))
        rows.append(("vqa_score (vqav2)", vqa_score, "VQA's script", script, "raw where all people agree"))
    print(f"{'ours':<22} {'theirs':<22} {'answers':>8} {'agree':>8}")
    for name, ours, other, theirs, reason in rows:
        if theirs is None:
            print(f"{name:<22} {other:<22} not installed")
            continue
        agreed, first = compare(ours, theirs, cases)
        print(f"{name:<22} {other:<22} {len(cases):>8,} {agreed:>8,}{'  ' + reason if reason else ''}")
        if first:
            print(f"    first: {first[:300]}")


def _file(package: str, inside: str, outside: Path | None) -> Path | None:
    """A file of an installed package, or of one installed into a folder."""
    if outside is not None:
        if str(outside) not in sys.path:
            sys.path.append(str(outside))  # for loguru and tqdm, behind what is installed
        return outside / inside if (outside / inside).exists() else None
    try:
        return Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        return None


def _load(name: str, file: Path):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(file: Path, name: str):
    """One function of a module whose other imports are not wanted."""
    tree = ast.parse(file.read_text())
    (node,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope = {"np": np, "re": re, "string": string}
    exec(compile(ast.Module([node], []), str(file), "exec"), scope)
    return scope[name]


if __name__ == "__main__":
    main()
