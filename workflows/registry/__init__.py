"""The MLflow model registry: versions with their lineage, the alias that serving follows, and how it moves.

A registered version is an MLflow pyfunc model whose artifact `model` is the model folder. Its tags say which data,
recipe and code made it, what it scored and what the gate is; the registered model's tags are its aliases' history.

    tag of a version          content
    mlmamba.model             digest of the trained stage; registering the same model again finds the version
    mlmamba.recipe            the recipe's name; the recipe itself is the run's artifact recipe.yaml
    mlmamba.git               commit of the code that trained it
    mlmamba.data_digest       digest of all the data; mlmamba.data describes each set (JSON)
    mlmamba.scores            scores by name (JSON); mlmamba.evaluation is the digest of the questions
    mlmamba.gate              the gate of the recipe (JSON, workflows/recipe/evaluate.py)
    mlmamba.forced.ALIAS      who moved the alias here past the gate, when and why (JSON)
    mlmamba.refused           the last replica that refused to serve it, when and why (JSON)

    tag of a registered model
    mlmamba.move.ALIAS.STAMP  one move of the alias (JSON, history.py)
    mlmamba.claim.ALIAS.STAMP someone is about to move it (claim.py); gone a moment later
"""

from workflows.registry.models import (
    PREFIX,
    Reference,
    ResolvedModel,
    get_version,
    holder,
    list_models,
    parse_reference,
    resolve_model,
    show_model,
)
from workflows.registry.promote import Promotion, gate_failures, promote, rollback, rolled_back
from workflows.registry.register import register
from workflows.registry.show import lineage

__all__ = [
    "PREFIX",
    "Promotion",
    "Reference",
    "ResolvedModel",
    "gate_failures",
    "get_version",
    "holder",
    "lineage",
    "list_models",
    "parse_reference",
    "promote",
    "register",
    "resolve_model",
    "rollback",
    "rolled_back",
    "show_model",
]
