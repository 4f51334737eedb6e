"""The recall study asks what the image shows, and both models are of a size."""

import torch

from tests.benchmarks.studies.recall import COLOURS, MODELS, PALETTE, PATCH, QUERIES, Samples, build, logits_of_answers


def test_the_answers_are_the_colours_of_the_named_glyphs():
    samples = Samples(3, 20, 0)
    pixels, ids, answers = samples.draw(5)
    assert ids.shape == (5, 9 + 20 + 2 * QUERIES)
    named = ids[:, -2 * QUERIES :: 2] - 2 - COLOURS
    assert torch.equal(ids[:, -2 * QUERIES + 1 :: 2] - 2, answers)
    cells = (
        pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(5, 9, 3, PATCH, PATCH)
    )
    for row in range(5):
        assert len({*named[row].tolist()}) == QUERIES
        for glyph, answer in zip(named[row], answers[row], strict=True):
            drawn = samples.glyphs[glyph] * PALETTE[answer][:, None, None]
            assert sum(torch.equal(cell, drawn) for cell in cells[row]) == 1


def test_the_models_differ_little_in_size_and_answer_every_question():
    samples, sizes = Samples(3, 20, 0), []
    for kinds in MODELS.values():
        model = build(kinds, 3, 32, 8)
        pixels, ids, _ = samples.draw(2, whole=False)
        assert logits_of_answers(model, pixels, ids).shape == (2, QUERIES, COLOURS)
        sizes.append(sum(p.numel() for p in model.language_model.parameters()))
    assert max(sizes) < 1.1 * min(sizes)
