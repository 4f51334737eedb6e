"""Does an outside evaluator get our score? lmms-eval asks the served model; `mlmamba evaluate` asks it directly.

    python -m tests.benchmarks.studies.evaluate_lmms_eval --model MODEL-FOLDER [--images 60] [--venv FOLDER]

lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval) is installed from PyPI into an environment of its own (7 GB, most of
it torch; --venv keeps it for the next time). Its tasks read a local Parquet file and ask `mlmamba serve` over HTTP
through its `openai` model. The same items lie in the layouts that `mlmamba evaluate` reads:

    exact   the bare questions, lmms-eval's exact_match          --benchmark llava
    vqav2   lmms-eval's own VQAv2 task, its prompt and scorer    --benchmark vqav2

Images and questions are easy-vqa's. For vqav2 each has ten people's answers, some of them wrong, unsure or written in
another way, so that scores lie between 0 and 1 and the answer normaliser has work.

Printed are both scores and how many answers and item scores agree; exits 1 unless all answers and scores are equal.
"""

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as Images

from pipelines.source_config import EasyVQASource
from pipelines.sources import open_source
from tests.helpers.processes import free_port
from workflows.evaluate.results import Answered, read_answers

PACKAGE, LONGEST, PEOPLE = "lmms-eval==0.7.3", 16, 10
TASKS = {"vqav2": "mlmamba_vqav2", "llava": "mlmamba_exact"}
"""Our benchmark and lmms-eval's task on the same items."""
_COMMON = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    validation: {parquet}
test_split: validation
output_type: generate_until
doc_to_visual: !function utils.vqav2_doc_to_visual
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: {longest}
  temperature: 0
metadata:
  - version: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_YAML = {
    "llava": _COMMON
    + """\
    ignore_case: true
    ignore_punctuation: true
doc_to_text: "{{{{question}}}}"
""",
    "vqav2": _COMMON
    + """\
doc_to_text: !function utils.vqav2_doc_to_text
process_results: !function utils.vqav2_process_results_val
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer the question using a single word or phrase."
""",
}
_UTILS = """\
from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text, vqav2_doc_to_visual, vqav2_process_results_val
"""


def main() -> int:
    """Write the files, ask both ways, compare. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder, as the quickstart's stages/full")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--venv", type=Path, help="environment with lmms-eval; made if it is not there")
    parser.add_argument("--work", type=Path, help="where files and logs go; by default a temporary folder")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (a.work or Path(temporary)).absolute()
        python = prepare_venv((a.venv or work / "venv").absolute())
        items = write_published(work / "vqav2", work / "llava", a.images)
        write_tasks(work / "task", items)
        ours = {name: ask_directly(name, a.model.absolute(), work, len(items)) for name in TASKS}
        theirs = ask_through_lmms_eval(python, a.model.absolute(), work)
        equal = [report(name, *ours[name], *theirs[name]) for name in TASKS]
        print("equal" if all(equal) else "NOT equal")
        return 0 if all(equal) else 1


def prepare_venv(folder: Path) -> Path:
    """Python of an environment with lmms-eval, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if subprocess.run([python, "-c", "import lmms_eval"], capture_output=True).returncode:
        print(f"installing {PACKAGE} into {folder} ...", flush=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PACKAGE], check=True)
    return python


def write_published(folder: Path, llava: Path, images: int) -> list[dict]:
    """Questions, answers and images as VQAv2 publishes them, and the same in LLaVA's layout. Returns the items."""
    source = open_source(EasyVQASource(type="easy_vqa", split="test", limit=images))
    (folder / "val2014").mkdir(parents=True)
    rng, items = random.Random(7), []
    for number, record in enumerate(source.records(), start=1):
        buffer = io.BytesIO()
        Images.open(io.BytesIO(source.read_image(record.images[0]))).convert("RGB").save(buffer, "JPEG", quality=95)
        (folder / "val2014" / f"COCO_val2014_{number:012d}.jpg").write_bytes(buffer.getvalue())
        turns = [turn.text for turn in record.turns]
        for k, (question, answer, kind) in enumerate(zip(turns[::2], turns[1::2], record.question_types, strict=True)):
            items.append(
                {
                    "question_id": number * 1000 + k,
                    "image_id": number,
                    "question": question,
                    "answers": ten_answers(answer, rng),
                    "multiple_choice_answer": answer,
                    "answer_type": "yes/no" if kind == "yes/no" else "other",
                    "image": buffer.getvalue(),
                }
            )
    head = {"info": {"version": "2.0"}, "data_subtype": "val2014"}
    asked = [{key: item[key] for key in ("question_id", "image_id", "question")} for item in items]
    named = ("question_id", "image_id", "answers", "multiple_choice_answer", "answer_type")
    answered = [{key: item[key] for key in named} for item in items]
    questions, annotations = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
    (folder / questions).write_text(json.dumps(head | {"questions": asked}))
    (folder / annotations).write_text(json.dumps(head | {"annotations": answered}))
    llava.mkdir()
    conversations = [
        {
            "id": str(item["question_id"]),
            "image": f"COCO_val2014_{item['image_id']:012d}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{item['question']}"},
                {"from": "gpt", "value": item["multiple_choice_answer"]},
            ],
        }
        for item in items
    ]
    (llava / "test.json").write_text(json.dumps(conversations))
    return items


def ten_answers(answer: str, rng: random.Random) -> list[dict]:
    """Ten people: 0 to 10 of them right, some of these with an article, capitals or a full stop."""
    ways = [answer, answer, answer.capitalize(), f"a {answer}", f"{answer}.", f" {answer} "]
    wrong = ["yes", "no", "two", "2", "don't know", "dont know", "teal, maybe", "it's a circle", "black and red"]
    right = rng.randrange(PEOPLE + 1)
    texts = [rng.choice(ways) for _ in range(right)] + [rng.choice(wrong) for _ in range(PEOPLE - right)]
    rng.shuffle(texts)
    sure = "yes"
    return [{"answer": text, "answer_confidence": sure, "answer_id": i} for i, text in enumerate(texts, start=1)]


def write_tasks(folder: Path, items: list[dict]) -> None:
    """lmms-eval's tasks: YAML, functions and Parquet."""
    folder.mkdir(parents=True)
    answer = {"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")}
    features = {"question_id": Value("int64"), "question": Value("string"), "answer": Value("string")}
    rows = [
        {
            "question_id": item["question_id"],
            "question": item["question"],
            "answer": item["multiple_choice_answer"],
            "answers": item["answers"],
            "image": {"bytes": item["image"], "path": None},
        }
        for item in items
    ]
    parquet = folder / "validation.parquet"
    Dataset.from_list(rows, features=Features(features | {"answers": [answer], "image": Image()})).to_parquet(parquet)
    for name, task in TASKS.items():
        (folder / f"{task}.yaml").write_text(_YAML[name].format(task=task, parquet=parquet, longest=LONGEST))
    (folder / "utils.py").write_text(_UTILS)


def ask_directly(name: str, model: Path, work: Path, questions: int) -> tuple[dict, list[Answered]]:
    """`mlmamba evaluate` on one of the layouts: its result and its rows, in the order of the items."""
    command = ["evaluate", model, "--benchmark", name, "--data", work / name, "--questions", questions]
    if name == "llava":
        command += ["--images", work / "vqav2" / "val2014"]
    command += ["--max-new-tokens", LONGEST, "--storage", work / "storage", "--workers", 1, "--json"]
    with open(work / "evaluate.log", "w") as log:
        done = subprocess.run(_mlmamba(*command), stdout=subprocess.PIPE, stderr=log, text=True, env=_environment())
    if done.returncode:
        raise SystemExit(f"mlmamba evaluate failed:\n{(work / 'evaluate.log').read_text()[-3000:]}")
    result = json.loads(done.stdout)
    return result, read_answers(Path(result["folder"]))


def ask_through_lmms_eval(python: Path, model: Path, work: Path) -> dict[str, tuple[float, list[tuple[str, float]]]]:
    """Serve the model and let lmms-eval ask it: for each task its score, and answer and score of every item."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = _mlmamba("serve", model, "--port", port, "--storage", work / "storage")
    with open(work / "serve.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(), start_new_session=True)
        try:
            wait_for(url, server, work / "serve.log")
            run_lmms_eval(python, url, model.name, work)
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
    found, results = {}, json.loads(next((work / "lmms_eval").rglob("*_results.json")).read_text())["results"]
    for name, task in TASKS.items():
        [score] = [value for key, value in results[task].items() if key.startswith("exact_match,")]
        with open(next((work / "lmms_eval").rglob(f"*_samples_{task}.jsonl"))) as file:
            lines = sorted(map(json.loads, file), key=lambda line: line["doc_id"])
        assert [line["doc_id"] for line in lines] == list(range(len(lines)))
        found[name] = score, [(_text(line["filtered_resps"]), float(line["exact_match"])) for line in lines]
    return found


def wait_for(url: str, server: subprocess.Popen, log: Path, limit: float = 600) -> None:
    """Return when the server answers. Raises SystemExit when it ends or does not."""
    end = time.monotonic() + limit
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"the server does not answer:\n{log.read_text()[-3000:]}")


def run_lmms_eval(python: Path, url: str, name: str, work: Path) -> None:
    """lmms-eval's command line on the task, offline."""
    arguments = f"model={name},base_url={url}/v1,api_key=none,num_concurrent=4,timeout=120"
    command = [
        python,
        "-m",
        "lmms_eval",
        "--model",
        "openai",
        "--model_args",
        arguments,
        "--tasks",
        ",".join(TASKS.values()),
    ]
    command += ["--include_path", work / "task", "--batch_size", "1", "--output_path", work / "lmms_eval"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "WANDB_MODE": "disabled", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [*map(str, command), "--log_samples"], capture_output=True, text=True, cwd=work, env=os.environ | offline
    )
    (work / "lmms_eval.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"lmms-eval failed:\n{(done.stdout + done.stderr)[-4000:]}")


def report(name: str, result: dict, rows: list[Answered], score: float, theirs: list[tuple[str, float]]) -> bool:
    """Print both scores and the agreement. Returns whether they are equal, item by item."""
    pairs = list(zip(rows, theirs, strict=True))
    same_text = sum(row.prediction == text.strip() for row, (text, _) in pairs)
    same_score = sum(abs(row.score - points) < 1e-9 for row, (_, points) in pairs)
    print(f"{name}: {len(rows):,} items, {len({row.prediction for row in rows})} different answers")
    print(f"  equal answers {same_text:,}, equal item scores {same_score:,}")
    print(f"  lmms-eval, asking mlmamba serve {score:9.4%}")
    own, blind = result["scores"]["overall"], result["blind"]["overall"]
    print(f"  mlmamba evaluate                {own:9.4%}   (with other images {blind:.4%})")
    for row, (text, points) in pairs:
        if row.prediction != text.strip() or abs(row.score - points) > 1e-9:
            shown = f"{row.prediction!r} {row.score}"
            print(f"  differs: {row.id} ours {shown}, theirs {text!r} {points}; people {row.answers}")
    return same_text == same_score == len(rows) and abs(own - score) < 1e-9


def _text(response: str | list) -> str:
    """The answer, which some versions of lmms-eval put into a list."""
    return response if isinstance(response, str) else response[0]


def _mlmamba(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "workflows.cli", *map(str, arguments)]


def _environment() -> dict[str, str]:
    """A Ray of its own for each command, whatever cluster runs here."""
    return os.environ | {"RAY_ADDRESS": "local"}


if __name__ == "__main__":
    sys.exit(main())
