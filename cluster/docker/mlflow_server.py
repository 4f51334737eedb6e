"""Starts MLflow's server on PostgreSQL and an S3-speaking object store, all from environment variables.

The database's password and the store's keys come from the environment alone, so neither shows in a list of processes.
The bucket is made when it is not there. Models travel through the server, so clients need no keys of the store.

    POSTGRES_HOST, POSTGRES_PORT (5432), POSTGRES_DB, POSTGRES_USER, POSTGRES_PASSWORD
    MLFLOW_BUCKET, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION
    MLFLOW_S3_ENDPOINT_URL         absent for AWS itself
    MLFLOW_SERVER_ALLOWED_HOSTS    names under which clients reach it, with ports, comma-separated
    MLFLOW_HOST, MLFLOW_PORT, MLFLOW_WORKERS and the others that `mlflow server` reads
"""

import os
import sys
from urllib.parse import quote

import boto3
from botocore.exceptions import ClientError

NEEDED = ("POSTGRES_HOST", "POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD", "MLFLOW_BUCKET")


def database(environment: dict[str, str]) -> str:
    """URI of the database, its password included."""
    user, password = quote(environment["POSTGRES_USER"], safe=""), quote(environment["POSTGRES_PASSWORD"], safe="")
    host, port = environment["POSTGRES_HOST"], environment.get("POSTGRES_PORT", "5432")
    return f"postgresql+psycopg2://{user}:{password}@{host}:{port}/{environment['POSTGRES_DB']}"


def make_bucket(name: str, endpoint: str | None) -> None:
    """Make the bucket unless it is there and ours."""
    store = boto3.client("s3", endpoint_url=endpoint or None)
    try:
        store.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        region = store.meta.region_name
        where = {} if region in (None, "us-east-1") else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        store.create_bucket(Bucket=name, **where)


def main() -> None:
    """Become the server. Ends with a message when a variable is missing."""
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        sys.exit(f"mlflow_server: {', '.join(missing)} must be set")
    make_bucket(os.environ["MLFLOW_BUCKET"], os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    os.environ["MLFLOW_BACKEND_STORE_URI"] = database(dict(os.environ))
    os.environ["MLFLOW_ARTIFACTS_DESTINATION"] = f"s3://{os.environ['MLFLOW_BUCKET']}"
    os.environ.setdefault("MLFLOW_HOST", "0.0.0.0")
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server"])


if __name__ == "__main__":
    main()
