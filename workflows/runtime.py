"""Starting what the workflow stands on: Ray, and quiet libraries."""

import logging
import os
import warnings
from pathlib import Path

QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


def quiet_libraries() -> None:
    """Keep libraries' own chatter off the terminal; their errors stay. Call before importing them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed reports its search for one
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="mlflow")
    for name in ("DeepSpeed", "deepspeed", "mlflow", "alembic", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect_ray(verbose: bool = False) -> None:
    """Connect to the cluster in RAY_ADDRESS, or start Ray on this machine; nothing when already connected.

    Args:
        verbose: show the workers' own output.
    """
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=verbose, logging_level=logging.ERROR, include_dashboard=False, configure_logging=True)
        logging.getLogger("ray").setLevel(logging.ERROR)
