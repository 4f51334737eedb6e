"""The parts of the typed recipe, one file each; workflows/recipe/schema.py puts them together."""
