"""The command's verbs, a few to a file; workflows/cli.py has the flat table of them."""
