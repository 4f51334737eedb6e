"""The parts of the typed recipe, one file each; workflows/config.py puts them together."""
