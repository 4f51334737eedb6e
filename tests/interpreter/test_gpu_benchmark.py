"""`python -m tests.benchmarks.gpu` at its tiny size on the interpreted kernels: every part gives its rows."""

import pytest

from tests.benchmarks import gpu


def test_every_part_gives_its_rows(capsys, monkeypatch):
    monkeypatch.setenv("MLMAMBA_OPS", "cuda")
    gpu.main(["--tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "stopped" in line]
    for start in ("limits", "scan", "convolution with state and boundaries", "prompt, batch 2", "decoding, batch 2"):
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1].startswith("training step")
    (scan,) = [line for line in lines if line.startswith("scan") and "float32" in line]
    outputs, gradients = (float(word.strip(",")) for word in scan.split() if "e-" in word)
    assert max(outputs, gradients) <= 1e-5


def test_a_machine_without_a_gpu_is_told_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA GPU here; --tiny runs on a CPU" in capsys.readouterr().err
