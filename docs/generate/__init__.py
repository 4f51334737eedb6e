"""The generated half of the documentation: pages of docs/reference made from the typed recipe, parsers and schemas."""
