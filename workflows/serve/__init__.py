"""Serving a registered model over HTTP in the form of OpenAI's chat completions, on Ray Serve."""
