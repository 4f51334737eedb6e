"""The ablation compares what it says: equal sizes, equal rows, equal first weights, and intervals that hold."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from transformers import AutoTokenizer

from mlmamba.modeling import MLMambaForConditionalGeneration
from tests.benchmarks.studies.ablation import read_lines, setting_of
from tests.benchmarks.studies.ablation_run import Remembered, run, same_language_model, train
from tests.benchmarks.studies.ablation_settings import (
    BLIND,
    CONNECTORS,
    LARGEST,
    MATCHED,
    Series,
    Setting,
    connector_fields,
    parameters,
    variant,
)
from tests.benchmarks.studies.ablation_table import KINDS, Claim, claims, differences, paired, table, verdict
from tests.helpers.packed_set import write_packed_set
from workflows.evaluate.benchmarks.own_data import TestSources
from workflows.recipe.load import load_recipe
from workflows.train.initial import model_config

SMALL = [
    "model.vision={towers: [{model: test_vit, block: -2, weights: random}], image_size: 32}",
    "model.connector={name: msc_advanced, head_dim: 16, state_size: 8, chunk_size: 4, hidden_size: 16}",
    "model.text={hidden_size: 16, num_hidden_layers: 1, state_size: 8, head_dim: 8, chunk_size: 64}",
]
STEPS, OWN, ROWS = 5, 2, 2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the runs, which leave it so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small():
    return load_recipe("quickstart", SMALL)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """On a data set of ten rows."""
    data = tmp_path_factory.mktemp("ablation") / "data"
    write_packed_set(data, {"train": 30})
    return Series("quickstart", data, data / "runs.jsonl", "this", STEPS, OWN, ROWS)


def build(recipe, series: Series, setting: Setting) -> MLMambaForConditionalGeneration:
    torch.manual_seed(setting.seed)
    tokenizer = AutoTokenizer.from_pretrained(series.data / "tokenizer")
    model = MLMambaForConditionalGeneration(model_config(variant(recipe, setting), tokenizer))
    same_language_model(model, setting.seed)
    return model


def made_up(effects: dict, seeds: int = 3, spread: float = 0.0) -> list[dict]:
    """Lines of runs whose scores are a seed's level, the effects of connector and stage, and noise."""
    rng, lines = np.random.default_rng(0), []
    for seed in range(seeds):
        for connector in CONNECTORS:
            for stage in (True, False):
                value = 0.5 + 0.1 * seed + effects.get(connector, 0) + effects.get(stage, 0) + spread * rng.normal()
                lines.append({"connector": connector, "stage": stage, "seed": seed, "parameters": 5})
                lines[-1]["scores"] = dict.fromkeys(KINDS, value)
    return lines


def claim(heading: str, label: str) -> Claim:
    return next(one for one in claims()[heading] if one.label == label)


@pytest.mark.parametrize("overrides", [[], ["model.connector.state_size=128"], ["model.text.hidden_size=256"]])
def test_the_mlp_has_the_size_of_the_advanced_msc(overrides):
    recipe = load_recipe("quickstart", overrides)
    sizes = {label: parameters(recipe, connector_fields(recipe, label)) for label in CONNECTORS}
    assert abs(sizes[MATCHED] / sizes[LARGEST] - 1) < 0.01
    assert abs(sizes["msc_advanced/csm"] / sizes[MATCHED] - 1) < 0.03
    assert sizes["mlp"] < 0.6 * sizes[MATCHED]


def test_without_the_stage_its_steps_go_to_the_other(series):
    recipe = load_recipe("quickstart")
    [connector, full], [alone] = (series.stages(recipe, own) for own in (True, False))
    assert (connector.steps, full.steps, alone.steps) == (OWN, STEPS - OWN, STEPS)
    assert connector.batch_rows == full.batch_rows == ROWS
    assert connector.trains == ["connector"]
    assert alone.model_dump(exclude={"steps"}) == full.model_dump(exclude={"steps"})
    assert full.epochs is None
    assert full.learning_rate == recipe.train.stages[1].learning_rate


def test_both_ways_see_the_same_rows_and_only_the_stage_spares_the_language_model(small, series):
    rows, after_own = {}, {}
    for on in (True, False):
        setting = Setting("msc_basic/csm", on, 1)
        model, rows[on] = build(small, series, setting), []
        first = {name: value.clone() for name, value in model.state_dict().items()}

        def look(module, given, inputs, model=model, first=first, on=on):
            rows[on].append(inputs["input_ids"].clone())
            if len(rows[on]) == OWN + 1:
                after_own[on] = {n.split(".")[0] for n, v in model.state_dict().items() if not v.equal(first.get(n, v))}

        model.register_forward_pre_hook(look, with_kwargs=True)
        losses = train(model, series, small, setting)
        assert set(losses) == ({"connector", "full"} if on else {"full"})
        changed = {n.split(".")[0] for n, value in model.state_dict().items() if not value.equal(first[n])}
        assert changed == {"connector", "language_model"}
    assert after_own == {True: {"connector"}, False: {"connector", "language_model"}}
    assert len(rows[True]) == STEPS
    assert all(a.equal(b) for a, b in zip(rows[True], rows[False], strict=True))
    assert not all(a.equal(b) for a, b in zip(rows[True][:2], rows[True][2:4], strict=True))


def test_the_seed_and_not_the_connector_decides_the_language_model(small, series):
    weights = {
        (connector, seed): build(small, series, Setting(connector, True, seed)).language_model.state_dict()
        for connector in ("mlp", "msc_advanced/csm")
        for seed in (0, 1)
    }
    one, other = weights["mlp", 0], weights["msc_advanced/csm", 0]
    assert all(value.equal(other[name]) for name, value in one.items())
    assert not all(value.equal(weights["mlp", 1][name]) for name, value in one.items())


def test_remembered_features_are_the_encoders_and_may_be_trained_on(small, series):
    model = build(small, series, Setting("mlp", True, 0))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    encoder = model.vision.eval()
    expected = torch.cat([encoder(one[None]) for one in pixels])
    model.vision = Remembered(encoder)
    with torch.inference_mode():  # as the answers are made, before another run trains in the same process
        assert model.vision(pixels).equal(expected)
    encoder.requires_grad_(False)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    features = model.get_image_features(pixels[[2, 0]])  # from memory: of the emptied encoder they would be others
    assert features.allclose(model.connector(expected[[2, 0]], encoder.grid))
    features.sum().backward()
    assert all(p.grad is not None for p in model.connector.parameters())


def test_a_run_trains_scores_and_writes_its_line(series, tmp_path):
    content = load_recipe("quickstart", [*SMALL, "data.test.0.limit=3"]).model_dump(mode="json", exclude_none=True)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    mine = replace(series, recipe=str(tmp_path / "small.yaml"), lines=tmp_path / "runs.jsonl")
    line = run(mine, BLIND)
    assert read_lines(mine) == [line]
    assert setting_of(line) == BLIND
    asked = TestSources(load_recipe(mine.recipe)).items
    assert line["majority"]["overall"] == pytest.approx(sum(item.answer == "yes" for item in asked) / len(asked))
    assert set(line["scores"]) == set(line["blind"]) == {"overall", *(item.type for item in asked)}


def test_the_interval_is_students():
    values = [0.031, -0.004, 0.018, 0.009]
    found = paired(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    three = paired([1.0, 2.0, 3.0])
    assert three.high - three.mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(paired([0.5]).low)
    with pytest.raises(ValueError, match="at least one"):
        paired([])


def test_three_seeds_hold_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(1)
    found = [paired(list(rng.normal(0.02, 0.05, 3))) for _ in range(2000)]
    held = np.mean([one.low <= 0.02 <= one.high for one in found])
    assert held == pytest.approx(0.95, abs=0.02)


def test_a_claim_finds_its_effect_whatever_the_seeds_level():
    lines = made_up({True: 0.03, MATCHED: 0.01, **{c: 0.05 for c in CONNECTORS if "csm" in c}})
    for heading, label, effect in (
        ("connector stage on - off", "all connectors", 0.03),
        ("connector stage on - off", "mlp", 0.03),
        ("csm - bsm", "both msc", 0.05),
        ("advanced - basic", "both scans", 0.0),
        ("msc - mlp of msc_advanced's size", "msc_advanced/csm", 0.04),
        ("msc - mlp of msc_advanced's size", "msc_advanced", 0.015),
    ):
        assert differences(lines, claim(heading, label), "overall") == pytest.approx([effect] * 3), label


def test_a_seed_with_a_missing_run_is_left_out():
    lines = [line for line in made_up({}) if setting_of(line) != Setting("mlp", False, 1)]
    assert len(differences(lines, claim("connector stage on - off", "all connectors"), "colour")) == 2
    assert len(differences(lines, claim("csm - bsm", "both msc"), "colour")) == 3


def test_a_pair_differs_only_in_what_is_asked():
    for heading, asked in claims().items():
        for (plus, on), (minus, off) in (pair for one in asked for pair in one.pairs):
            name, _, scan = plus.partition("/")
            other, _, other_scan = minus.partition("/")
            same = {"name": name == other, "scan": scan == other_scan, "stage": on == off}
            if MATCHED in minus and MATCHED not in plus:
                assert same["stage"]
            else:
                differs = {"connector stage on - off": "stage", "csm - bsm": "scan", "advanced - basic": "name"}
                assert [key for key, value in same.items() if not value] == [differs[heading]]


def test_the_words_say_what_the_interval_says():
    assert verdict(paired([0.02, 0.021, 0.019])) == "better"
    assert verdict(paired([-0.02, -0.021, -0.019])) == "worse"
    assert verdict(paired([0.02, -0.021, 0.019])) == "no difference that three seeds can show"
    assert verdict(paired([0.02])) == "one seed says nothing"


def test_the_table_shows_means_spreads_and_verdicts():
    lines = made_up({True: 0.03, "msc_advanced/csm": 0.2}, spread=1e-3)
    lines[0] |= {"blind": dict.fromkeys(KINDS, 0.4), "majority": dict.fromkeys(KINDS, 0.3)}
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table(lines).splitlines() if "|" in row]
    found = {(row[0], *row[2:3]): row for row in rows}
    assert found["mlp", "on"][3:5] == ["3", "63.0 (10.0)"]
    assert found["mlp", "off"][4] == "60.0 (10.0)"
    assert found["blind of mlp", "on"][4:] == ["40.0"] * 4
    assert found["majority of mlp", "on"][4:] == ["30.0"] * 4
    says = {(row[0], row[1].split()[0]): row[-1] for row in rows if len(row) == 6 and row[1]}
    assert says["all connectors", "+3.0"] == "better"
    assert says["msc_advanced/csm", "+20.0"] == "better"
    assert says["msc_advanced/bsm", "+0.0"] == "no difference that three seeds can show"


def test_lines_of_another_plan_are_left_alone(tmp_path):
    series = Series("quickstart", tmp_path, tmp_path / "runs.jsonl", "this", STEPS, OWN, ROWS)
    assert read_lines(series) == []
    lines = [
        {"plan": plan, "connector": "mlp", "stage": True, "seed": seed} for plan, seed in (("this", 0), ("other", 1))
    ]
    series.lines.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [setting_of(line) for line in read_lines(series)] == [Setting("mlp", True, 0)]
