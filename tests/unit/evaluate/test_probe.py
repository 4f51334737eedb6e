"""The scaling probe: a fair peer, exact powers, true bytes. No test looks at a time."""

import json

import pytest
import torch

from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import SIZES, preset
from tests.helpers.tiny import tiny_model
from workflows.evaluate.probe import (
    DECODE,
    OURS,
    PEER,
    PREFILL,
    Measurement,
    PeakMemory,
    count_parameters,
    fit_powers,
    power_of,
    probe_scaling,
    same_size_transformer,
)
from workflows.evaluate.probe_report import text, verdict, write_probe

LENGTHS, BATCHES = (16, 32, 64), (1, 2)


@pytest.fixture(scope="module")
def found():
    torch.set_num_threads(1)
    return probe_scaling(tiny_model(), LENGTHS, BATCHES, rounds=1)


@pytest.mark.parametrize("size", ["130m", "2.7b"])
def test_the_transformer_has_the_size_the_vocabulary_and_llamas_proportions(size):
    with torch.device("meta"):
        ours = MLMambaForConditionalGeneration(preset(size, vision={"towers": [{"model": "test_vit", "block": -2}]}))
        parameters = count_parameters(ours.language_model)
        peer = same_size_transformer(ours.config.text_config, 4096, parameters)
    assert count_parameters(peer) == pytest.approx(parameters, rel=0.005)
    assert peer.config.vocab_size == 50_288
    layers, width = SIZES[size]
    assert (peer.config.num_hidden_layers, peer.config.hidden_size) == (layers // 2, width)
    assert 2.4 < peer.config.intermediate_size / width < 3.0
    assert peer.get_output_embeddings().weight is peer.get_input_embeddings().weight
    assert peer.config._attn_implementation == "sdpa"


def test_a_model_too_small_for_a_transformer_is_refused():
    config = tiny_model().config.text_config
    with pytest.raises(ValueError, match="has only 5,000 parameters"):
        same_size_transformer(config, 64, 5000)


def test_powers_are_those_of_the_formula():
    assert power_of([(n, 3 * n) for n in (10, 100, 1000)]) == pytest.approx(1)
    assert power_of([(n, 0.5 * n**2) for n in (10, 100, 1000)]) == pytest.approx(2)
    assert power_of([(n, 7) for n in (10, 100, 1000)]) == pytest.approx(0)
    # a fixed cost hides the power at short lengths; over the last three it shows
    points = [Measurement(OURS, PREFILL, 1, n, 100 + n**2 / 100, 1.0, 8, None) for n in (8, 64, 512, 4096, 32768)]
    [seconds] = [power for power in fit_powers(points) if power.quantity == "seconds"]
    assert seconds.power < 1.7 < 1.9 < seconds.last < 2.0


def test_every_setting_is_measured_for_both_models(found):
    keys = {(m.model, m.phase, m.batch, m.length) for m in found.measurements}
    assert keys == {(m, p, b, n) for m in (OURS, PEER) for p in (PREFILL, DECODE) for b in BATCHES for n in LENGTHS}
    assert len(found.measurements) == len(keys)
    assert all(m.seconds > 0 and m.tokens_per_second > 0 for m in found.measurements)
    assert found.parameters[PEER] == pytest.approx(found.parameters[OURS], rel=0.05)
    assert found.image_tokens == 4


def test_the_state_is_constant_and_the_key_value_cache_grows_with_the_length(found):
    for batch in BATCHES:
        kept = {
            model: [m.kept_bytes for m in found.measurements if (m.model, m.phase, m.batch) == (model, PREFILL, batch)]
            for model in (OURS, PEER)
        }
        config = tiny_model().config.text_config
        layers, width, inner = config.num_hidden_layers, config.hidden_size, config.hidden_size * config.expand
        state = layers * 4 * (inner * config.state_size + (inner + 2 * config.state_size) * (config.conv_kernel - 1))
        assert kept[OURS] == [batch * state] * 3
        assert kept[PEER] == [batch * ((layers + 1) // 2) * 2 * width * n * 4 for n in LENGTHS]
    powers = {(p.model, p.batch): p.power for p in found.powers if p.quantity == "kept bytes"}
    assert powers == {(OURS, b): pytest.approx(0) for b in BATCHES} | {(PEER, b): pytest.approx(1) for b in BATCHES}


def test_the_table_and_the_files_hold_what_was_measured(found, tmp_path):
    shown = text(found)
    for m in found.measurements:
        if m.phase == PREFILL:
            assert f"{1000 * m.seconds:.1f}" in shown
    assert verdict(found) in shown
    assert "ML-Mamba  0.00 (0.00)   Transformer  1.00 (1.00)" in shown
    files = {file.name: file for file in write_probe(found, tmp_path)}
    assert json.loads(files["scaling.json"].read_text())["measurements"][0]["model"] == OURS
    assert files["scaling.png"].read_bytes()[:4] == b"\x89PNG"
    assert files["scaling.txt"].read_text().strip() == shown


def test_the_verdict_follows_the_last_powers(found):
    linear = [(p.model, p.last) for p in found.powers if p.quantity == "seconds" and p.phase == PREFILL]
    for model in (OURS, PEER):
        expected = "linear" if max(last for name, last in linear if name == model) <= 1.15 else "more than linear"
        assert f"{model} {expected} (" in verdict(found)


def test_peak_memory_sees_what_is_freed_again():
    with PeakMemory(torch.device("cpu")) as memory:
        torch.ones(32 << 20, dtype=torch.uint8).max()
    if memory.bytes is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert 30 << 20 < memory.bytes < 48 << 20
    with PeakMemory(torch.device("cpu")) as nothing:
        pass
    assert nothing.bytes < 4 << 20


def test_one_length_is_no_scaling():
    with pytest.raises(ValueError, match="two lengths or more"):
        probe_scaling(tiny_model(), (64, 64))
    with pytest.raises(ValueError, match="all over 0"):
        probe_scaling(tiny_model(), (0, 64))
