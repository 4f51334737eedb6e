"""The playground: one page to show a model a picture and ask about it."""
