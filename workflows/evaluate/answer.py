"""Where models registered by version 0.1 look for their answerer."""

from mlmamba.answering import Answerer, Asked

__all__ = ["Answerer", "Asked"]
