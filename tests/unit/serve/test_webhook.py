"""Signatures of MLflow's webhooks, made by MLflow's own function."""

import pytest
from mlflow.webhooks.delivery import _generate_hmac_signature

from workflows.serve.webhook import signed

NOW, SECRET, BODY = 1_800_000_000, "secret", '{"entity": "model_version_alias"}'


def headers(secret=SECRET, sent=str(NOW), body=BODY):
    signature = _generate_hmac_signature(secret, "id-1", sent, body)
    return {"x-mlflow-delivery-id": "id-1", "x-mlflow-timestamp": sent, "x-mlflow-signature": signature}


def test_what_mlflow_signed_is_accepted():
    assert signed(headers(), BODY.encode(), SECRET, NOW + 10)


@pytest.mark.parametrize(
    ("given", "body", "now"),
    [
        (headers("other"), BODY, NOW),
        (headers(), BODY + " ", NOW),
        (headers(), BODY, NOW + 301),
        (headers(), BODY, NOW - 301),
        (headers() | {"x-mlflow-timestamp": str(NOW + 1)}, BODY, NOW),
        (headers() | {"x-mlflow-delivery-id": "id-2"}, BODY, NOW),
        (headers() | {"x-mlflow-timestamp": "soon"}, BODY, NOW),
        (headers() | {"x-mlflow-signature": "v1,\u00e9"}, BODY, NOW),
        ({}, BODY, NOW),
    ],
)
def test_anything_else_is_not(given, body, now):
    assert not signed(given, body.encode(), SECRET, now)
