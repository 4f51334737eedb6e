"""A workflow's MLflow run, and the journal that it is fed from."""
