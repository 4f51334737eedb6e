"""Evaluation: the questions of the test sources, answers by a model, scores beside baselines, a sheet to look at."""
