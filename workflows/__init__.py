"""The command line and everything it runs: recipes, training, tracking, registry, evaluation, serving."""
