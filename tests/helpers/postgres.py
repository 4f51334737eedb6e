"""A real PostgreSQL on this machine, and MLflow's server on it and on an object store, for the time of some tests."""

import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2

from tests.helpers.manifests import CLUSTER
from tests.helpers.processes import free_port
from tests.helpers.registry_server import stop
from tests.helpers.s3 import S3

USER, DATABASE = "mlflow", "mlflow"
_SECONDS_TO_START = 300


def programs() -> Path | None:
    """Folder with initdb and postgres (Debian keeps it off the PATH), or None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "postgres").exists()), None)


@dataclass(frozen=True)
class Postgres:
    """A running server with an empty database of our user's."""

    port: int
    password: str

    def connect(self):
        """A connection to the database."""
        where = {"host": "127.0.0.1", "port": self.port, "dbname": DATABASE}
        return psycopg2.connect(user=USER, password=self.password, **where)

    def rows(self, query: str) -> list[tuple]:
        """What a query finds."""
        connection = self.connect()
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(query)
                return cursor.fetchall()
        finally:
            connection.close()


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Start PostgreSQL on a data folder and port of its own, as a user that is not root; stop it at the end."""
    bin_folder, server = programs(), Postgres(free_port(), f"p@ss/{secrets.token_hex(8)}")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: its socket lies in it
    person = pwd.getpwnam("postgres").pw_name if os.geteuid() == 0 else None  # PostgreSQL refuses root
    if person:
        shutil.chown(folder, person)
    (folder / "password").write_text(server.password)
    options = {"cwd": folder, "user": person, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    data = folder / "data"
    command = [bin_folder / "initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", "--no-sync", "--no-locale"]
    try:
        done = subprocess.run([*command, "-E", "UTF8", "--pwfile", folder / "password"], **options, timeout=120)
        assert done.returncode == 0, done.stdout
        listen = ["-h", "127.0.0.1", "-p", str(server.port), "-k", folder, "-c", "fsync=off"]
        with open(folder / "log", "wb") as log:
            options |= {"stdout": log, "stderr": log, "text": False}
            process = subprocess.Popen([bin_folder / "postgres", "-D", data, *listen], **options)
        try:
            _make_database(server, process, folder / "log")
            yield server
        finally:
            process.terminate()
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow_on(postgres: Postgres, s3: S3, folder: Path, bucket: str = "models") -> Iterator[str]:
    """MLflow's server as the images start it (cluster/docker/mlflow_server.py). Yields its URI."""
    port = free_port()
    settings = {
        "POSTGRES_HOST": "127.0.0.1",
        "POSTGRES_PORT": str(postgres.port),
        "POSTGRES_DB": DATABASE,
        "POSTGRES_USER": USER,
        "POSTGRES_PASSWORD": postgres.password,
        "MLFLOW_S3_ENDPOINT_URL": s3.endpoint,
        "MLFLOW_BUCKET": bucket,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": str(port),
        "MLFLOW_WORKERS": "1",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"mlflow:5000,127.0.0.1:{port}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, CLUSTER / "docker" / "mlflow_server.py"],
            stdout=log,
            stderr=log,
            env=environment | settings,
            cwd=folder,
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        _wait(uri, process, folder / "server.log")
        yield uri
    finally:
        stop(process)


def _make_database(server: Postgres, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            connection = psycopg2.connect(
                host="127.0.0.1", port=server.port, user=USER, password=server.password, dbname="postgres"
            )
            break
        except psycopg2.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    connection.autocommit = True  # no database can be made within a transaction
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {DATABASE}")
    connection.close()


def _wait(uri: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
