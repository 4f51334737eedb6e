"""`--dry-run`: the paper's arithmetic, and what it says where nothing is known. Nothing is started or written."""

import json
import math
from pathlib import Path

import pytest

from pipelines.manifest import Manifest, SplitInfo
from tests.helpers.manifests import find
from tests.helpers.toy_workflow import recipe, write_corpus, write_recipe
from workflows.cli import main
from workflows.plan.data import DRIVER_SECONDS, Rows, plan_nodes
from workflows.recipe.load import load_recipe


@pytest.fixture
def plan(capsys, tmp_path):
    """Run `mlmamba VERB RECIPE --dry-run` in this process; returns code, JSON or text, and stderr."""

    def run(*arguments, code: int = 0):
        storage = tmp_path / "storage"
        assert main([*map(str, arguments), "--dry-run", "--storage", str(storage)]) == code
        assert not storage.exists()
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


@pytest.fixture(scope="module")
def paper() -> dict:
    """The plan of the paper's recipe."""
    from workflows.plan.train import machine_of, plan_training
    from workflows.storage.folder import Folder

    content = load_recipe("paper")
    return plan_training(content, Folder("/nowhere"), {}, machine_of(content, None, 0.3, None))


def test_the_papers_model_has_the_published_sizes(paper):
    sizes = paper["parameters"]
    assert round(sizes["language_model"] / 1e6, 1) == 2702.6  # state-spaces/mamba2-2.7b, tied, 50,288 rows
    assert sizes["language_model"] == by_hand(2560, 64, 50_288)
    # DINOv2-L with registers and SigLIP-SO400M without its pooling head or with it: 304.4M + 412.4M to 428.2M
    assert 304e6 + 412e6 < sizes["vision"] < 305e6 + 429e6
    assert sizes["total"] == sum(sizes[part] for part in ("vision", "connector", "language_model"))


def by_hand(width: int, blocks: int, rows: int, state: int = 128, head: int = 64) -> int:
    """Parameters of a Mamba-2 language model (arXiv 2405.21060, section 7.1; one group, four taps, tied head)."""
    inner = 2 * width
    heads, conv = inner // head, inner + 2 * state
    block = width * (inner + conv + heads) + 5 * conv + 3 * heads + inner + inner * width + width
    return blocks * block + rows * width + width


def test_the_papers_two_stages_have_its_samples_rates_and_batches(paper):
    connector, full = paper["stages"]
    assert connector["trains"] == ["connector"]
    assert full["trains"] == ["connector", "language_model"]
    assert connector["rows"]["samples"] == 558_128
    assert full["rows"]["samples"] == 665_298
    assert (connector["learning_rate"], full["learning_rate"]) == (1e-3, 2e-5)
    assert (connector["weight_decay"], full["weight_decay"]) == (0.0, 0.1)
    assert connector["batch_samples"] == pytest.approx(256, rel=0.05)
    assert full["batch_samples"] == pytest.approx(128, rel=0.05)
    assert paper["workers"] == 8
    assert connector["trained"] == paper["parameters"]["connector"]
    assert full["frozen"] == paper["parameters"]["vision"]


def test_steps_are_one_pass_over_the_rows(paper):
    for stage in paper["stages"]:
        assert stage["steps"] == stage["rows"]["rows"] // stage["batch_rows"]
        assert stage["positions"] == stage["steps"] * stage["batch_rows"] * 4096
        assert stage["rows"]["tokens"] <= stage["rows"]["rows"] * 4096
    # 558,128 captions of 729 + 32 tokens in rows of 4,096 that are 97 % full
    assert paper["stages"][0]["rows"]["rows"] == math.ceil(558_128 * 761 / (4096 * 0.97))


def test_the_full_stage_costs_six_operations_per_weight_and_position(paper):
    """6 N D (arXiv 2001.08361) for the language model's matrices, which are all but a twentieth of it."""
    full = paper["stages"][1]
    estimate = 6 * (paper["parameters"]["language_model"] - 50_288 * 2560) * full["positions"]
    assert full["flops"] == pytest.approx(estimate, rel=0.2)
    assert full["flops"] > estimate  # the scan, the encoders and the head come on top
    hours = full["flops"] / (8 * 312e12 * 0.3) / 3600
    assert full["hours"] == pytest.approx(hours)


def test_memory_by_zero_stage_is_the_table_for_the_papers_full_stage(paper):
    full, sizes = paper["stages"][1], paper["parameters"]
    everything, trained = sizes["total"], sizes["connector"] + sizes["language_model"]
    zero = {state["zero_stage"]: state for state in full["memory"]["zero"]}
    assert zero[0]["weights"] == 4 * everything
    assert zero[3]["weights"] == 4 * everything // 8
    assert zero[2]["gradients"] == 4 * trained // 8
    assert zero[0]["optimizer"] == 8 * trained
    assert zero[3]["optimizer"] == 8 * trained // 8
    assert [state["fits"] for state in zero.values()] == [True] * 4
    assert full["checkpoint_bytes"] == 16 * trained
    kept = full["memory"]["activations"]
    assert 0 < kept["with"] < kept["without"]


def test_the_papers_recipe_takes_the_stage_that_sends_least_of_those_that_fit(paper):
    for stage in paper["stages"]:
        assert stage["accumulation"] == 1
        fits = {state["zero_stage"] for state in stage["memory"]["zero"] if state["fits"]}
        sends = {s["zero_stage"]: s["total"] for s in stage["communication"] if s["zero_stage"] in fits}
        assert paper["zero_stage"] == 2
        assert sends[2] == min(sends.values())


def test_the_text_has_the_same_numbers(plan):
    text = plan("train", "paper")
    for word in ("2,702.6M", "lr 0.001", "lr 2e-05", "8 workers", "558,128", "665,298", "ZeRO 2", "GiB gathered"):
        assert word in text
    assert "* ZeRO 2" in text  # the recipe's


def test_a_gpu_that_is_too_small_is_said(plan):
    small = ("train", "paper", "--gpu-memory", 24, "--set", "train.stages.1.micro_batch_rows=1")
    assert "does not fit" in plan(*small)
    content = json.loads(plan(*small, "--json"))
    assert [state["fits"] for state in content["stages"][1]["memory"]["zero"]] == [False, False, False, True]


def test_unknown_data_leaves_the_rows_open_until_they_are_given(plan, tmp_path):
    content = recipe(tmp_path)
    content["data"]["train"][0] |= {"annotations": "s3://bucket/train.json"}
    content["train"]["stages"][1] |= {"epochs": 2}
    del content["train"]["stages"][1]["steps"]
    file = write_recipe(tmp_path / "recipe.yaml", content)
    text = plan("train", file)
    assert "rows        unknown (nothing is known of llava: --records llava=COUNT" in text
    assert text.rstrip().endswith("in all      unknown")
    result = json.loads(plan("train", file, "--records", "llava=1000x100", "--json"))
    stage = result["stages"][1]
    assert stage["rows"]["samples"] == 1000
    assert stage["rows"]["tokens"] == 1000 * 104  # four tokens an image
    assert stage["steps"] == 2 * (stage["rows"]["rows"] // 2)
    assert stage["hours"] is None  # nothing is presumed of a CPU


def test_a_corpus_on_this_machine_is_looked_at(plan, tmp_path):
    write_corpus(tmp_path, count=40)
    file = write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path))
    (data,) = json.loads(plan("prepare", file, "--json"))["data"]
    rows = data["rows"]
    assert (rows["samples"], rows["images"], rows["estimated"]) == (40, 40, True)
    images = sum(path.stat().st_size for path in (tmp_path / "train").iterdir())
    assert images * 0.8 < rows["bytes"] < images * 1.5
    letters = len("What colour is it?greenIs it green?yesIs it round?no")
    assert 40 * (letters / 4 + 4) < rows["tokens"] < 40 * (letters + 4)  # tokens are of one to four letters


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["keep_features=auto"], "features    28.9 MiB at most, kept beside the data set"),
        (["keep_features=auto", "steps=1", "epochs=null"], "features    not kept: an image is shown 0."),
        (["keep_features=auto", "augment={flip: true}"], "features    not kept: images or encoder change"),
    ],
)
def test_kept_features_are_counted_or_it_says_why_there_are_none(plan, changes, line):
    sets = [part for change in changes for part in ("--set", f"train.stages.1.{change}")]
    content = json.loads(plan("train", "quickstart", *sets, "--json"))
    connector, full = content["stages"]
    kept = 3_700 * 16 * 128 * 4  # float32, 128 channels of 4 x 4 cells, of each image
    assert connector["features"] is None
    assert full["features"]["bytes"] == content["disk"]["features"] == (0 if "not kept" in line else kept)
    parts = ("data", "features", "models", "checkpoints", "registered")
    assert content["disk"]["total"] == sum(content["disk"][name] for name in parts)
    assert line in plan("train", "quickstart", *sets)


def test_rows_at_once_that_are_measured_are_planned_at_their_most(plan):
    assert "(at most 2 x 1 per worker)" in plan("train", "quickstart", "--set", "train.stages.1.micro_batch_rows=auto")
    assert "at most" not in plan("train", "quickstart")


def test_prepared_data_is_counted_and_not_estimated(tmp_path, capsys):
    file = write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path))
    assert main(["prepare", str(file), "--storage", str(tmp_path), "--dry-run", "--json"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["data"][0]["folder"])
    split = SplitInfo(
        shards=[], rows=10, samples=47, tokens=2021, loss_tokens=282, images=47, fill=0.79, samples_by_source={},
        records=48, quarantined={}, quarantined_by_source={}, cut=0, cut_turns=0,
    )  # fmt: skip
    fields = {"digest": "", "tokenizer_digest": "", "recipe_digest": "", "sources": {}}
    folder.mkdir(parents=True)
    Manifest(**fields, max_tokens=256, tokens_per_image=4, splits={"train": split}).save(str(folder))
    assert main(["train", str(file), "--storage", str(tmp_path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "rows        10 (prepared)" in text
    assert "steps       40 of 2 rows, 9 samples (1 x 1 per worker); 376 samples" in text  # 47 x 80 / 10
    (folder / "manifest.json").write_text("{}")  # of another version: it will be made anew
    assert main(["train", str(file), "--storage", str(tmp_path), "--dry-run"]) == 0
    assert "unknown (nothing is known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--records", "nowhere=5"), "--records nowhere: the recipe's training sources are llava"),
        (("--records", "llava"), "write SOURCE=COUNT"),
        (("--records", "llava=0"), "write SOURCE=COUNT"),
        (("--mfu", "2"), "--mfu 2.0 must be above 0 and at most 1"),
        (("--node-cpus", "0"), "--node-cpus 0 must be 1 or more"),
    ],
)
def test_a_wrong_option_is_bad_usage(option, message, plan, tmp_path):
    file = write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path))
    verb = "prepare" if "--node-cpus" in option else "train"
    assert message in plan(verb, file, *option, code=2)


def test_the_plan_of_a_preparation_has_shards_bytes_and_memory(plan):
    (data,) = json.loads(plan("prepare", "data/llava-558k", "--json"))["data"]
    assert data["shards"] == -(-data["rows"]["rows"] // 256)
    assert data["rows"]["bytes"] > 558_128 * 48_000
    assert data["task_bytes"] == pytest.approx(data["rows"]["bytes"] / data["shards"], rel=0.01)
    assert data["disk"] == {
        "shards": data["rows"]["bytes"],
        "work": data["rows"]["bytes"],
        "total": 2 * data["rows"]["bytes"],
    }


def test_more_nodes_shorten_what_the_workers_do_and_not_what_the_driver_does(plan):
    (data,) = json.loads(plan("prepare", "data/llava-665k", "--json"))["data"]
    (wider,) = json.loads(plan("prepare", "data/llava-665k", "--node-cpus", 32, "--json"))["data"]
    one, two, *_, last = data["nodes"]
    alone = DRIVER_SECONDS * 665_298 / 3600
    assert one["hours"] - alone == pytest.approx(2 * (two["hours"] - alone))
    assert alone < last["hours"] < one["hours"]
    assert wider["nodes"][0]["hours"] == pytest.approx(two["hours"])  # as many CPUs
    assert wider["nodes"][0]["node_memory"] == 2 * one["node_memory"]
    # Images are read and written twice in the time that it takes.
    assert one["bytes_per_second"] == pytest.approx(4 * data["rows"]["bytes"] / (3600 * one["hours"]))


def test_two_cpus_do_as_many_records_per_second_as_were_measured():
    """672, of 46 KiB an image, by tests/benchmarks/measurements/prepare_throughput.py on two idle cores."""
    rows = Rows(**dict.fromkeys(("rows", "images", "tokens", "loss_tokens"), 0), samples=1000, bytes=1000 * 46 * 1024,
                estimated=False, how="")  # fmt: skip
    assert 1000 / (3600 * plan_nodes(rows, 0, 2)[0]["hours"]) == pytest.approx(672, rel=0.05)


def test_larger_images_take_longer(plan):
    """As many records in both sets, with images of 48 and of 150 KB."""
    small, large = (
        json.loads(plan("prepare", f"data/{name}", "--records", f"{name}=500000", "--json"))["data"][0]["nodes"][0]
        for name in ("llava-558k", "llava-665k")
    )
    assert large["hours"] > 1.2 * small["hours"]


def test_a_node_of_the_cpu_pool_holds_the_papers_preparation(plan):
    pool = find("kuberay", "RayCluster")["spec"]["workerGroupSpecs"][0]
    limits = pool["template"]["spec"]["containers"][0]["resources"]["limits"]
    for data in json.loads(plan("prepare", "paper", "--node-cpus", limits["cpu"], "--json"))["data"]:
        assert data["nodes"][0]["node_memory"] < int(limits["memory"].removesuffix("Gi")) << 30
        assert data["nodes"][-1]["nodes"] == pool["maxReplicas"]
