"""What travels to the cluster and what stays, and what the first script says of a cluster that lacks something."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from workflows.cli import main
from workflows.errors import UsageError
from workflows.submit import package as packing
from workflows.submit.package import SECRET_NAMES, pack

START = Path(packing.__file__).with_name("start.py")


def names(folder: Path, tmp_path: Path, excludes: tuple[str, ...] = (), storage: str = "/nowhere") -> set[str]:
    """Files of the working folder that travel."""
    package = pack(tmp_path / "job.zip", folder, storage, {"recipe.yaml": "name: x"}, list(excludes))
    with zipfile.ZipFile(package.file) as archive:
        every = set(archive.namelist())
    assert "_job/recipe.yaml" in every
    assert {"workflows/cli.py", "mlmamba/modeling.py", "pipelines/prepare.py", "workflows/recipes/paper.yaml"} <= every
    return {name for name in every if name.split("/")[0] not in (*packing.PACKAGES, packing.JOB_FOLDER)}


@pytest.fixture
def folder(tmp_path) -> Path:
    work = tmp_path / "work"
    for name in ("recipe.yaml", "notes/a.txt", ".env", ".git/config", ".venv/bin/python", "storage/runs/x"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    (work / "__pycache__").mkdir()
    (work / "__pycache__" / "a.pyc").write_text("")
    return work


def test_hidden_names_storage_and_caches_stay(folder, tmp_path):
    assert names(folder, tmp_path) == {"recipe.yaml", "notes/a.txt"}


def test_a_storage_of_another_name_stays_too(folder, tmp_path):
    (folder / "made").mkdir()
    (folder / "made" / "model").write_text("")
    assert names(folder, tmp_path, storage=str(folder / "made")) == {"recipe.yaml", "notes/a.txt"}


@pytest.mark.parametrize("pattern", ["notes", "notes/", "*.txt", "notes/*"])
def test_what_the_user_excludes_stays(folder, tmp_path, pattern):
    assert names(folder, tmp_path, (pattern,)) == {"recipe.yaml"}


def test_large_files_stay_and_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGEST", 100)
    (folder / "weights.bin").write_bytes(b"0" * 101)
    package = pack(tmp_path / "job.zip", folder, "/nowhere", {}, [])
    assert "weights.bin: 0.1 KiB, over 0.1 KiB" in package.staying()


def test_in_a_checkout_git_decides(folder, tmp_path):
    (folder / ".git" / "config").unlink()
    (folder / ".git").rmdir()
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / ".gitignore").write_text("notes/\n")
    assert names(folder, tmp_path) == {"recipe.yaml"}


def test_a_folder_of_our_packages_name_does_not_stand_in_for_them(folder, tmp_path):
    (folder / "workflows").mkdir()
    (folder / "workflows" / "cli.py").write_text("raise SystemExit('not this one')")
    package = pack(tmp_path / "job.zip", folder, "/nowhere", {}, [])
    with zipfile.ZipFile(package.file) as archive:
        assert b"flat table of verbs" in archive.read("workflows/cli.py")


def test_the_same_content_is_the_same_zip(folder, tmp_path):
    first = pack(tmp_path / "1.zip", folder, "/nowhere", {"a": "b"}, []).file.read_bytes()
    (folder / "recipe.yaml").touch()
    assert pack(tmp_path / "2.zip", folder, "/nowhere", {"a": "b"}, []).file.read_bytes() == first


def test_too_much_is_refused_with_the_largest_folders(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MOST", 1000)
    with pytest.raises(UsageError, match=r"a job takes .*largest: .*workflows/ \("):
        pack(tmp_path / "job.zip", folder, "/nowhere", {}, [])
    monkeypatch.setattr(packing, "MOST_FILES", 1)
    with pytest.raises(UsageError, match="over 1 files"):
        pack(tmp_path / "job.zip", folder, "/nowhere", {}, [])


KEY = "-----BEGIN {}-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcw\n-----END {}-----\n"
SECRETS = {
    **dict.fromkeys(
        ["id_rsa", "deploy/id_ed25519", "id_ecdsa_sk", "tls.pem", "TLS.PEM", "server.key", "cert.p12", "cert.pfx"], "x"
    ),
    **dict.fromkeys(["kubeconfig", "prod.kubeconfig", "kubeconfig.yaml", "credentials.json", "conf/credentials"], "x"),
    **dict.fromkeys(["secrets.env", "prod.env", "prod.env.local", "secrets.yaml", "db_secrets.json", "secrets/a"], "x"),
    **dict.fromkeys([".netrc", "_netrc", ".aws/credentials", ".ssh/config", ".git-credentials", "kaggle.json"], "x"),
    **dict.fromkeys(["gcp-service_account.json", "terraform.tfstate", "token", "prod.tfvars"], '{"a": 1}'),
    "notes/deploy.txt": KEY.format("OPENSSH PRIVATE KEY", "OPENSSH PRIVATE KEY"),
    "notes/old": KEY.format("RSA PRIVATE KEY", "RSA PRIVATE KEY").replace("\n", "\r\n"),
    "sa.json": json.dumps({"private_key": KEY.format("PRIVATE KEY", "PRIVATE KEY")}),
    "config": "users:\n- user:\n    client-key-data: LS0tLS1CRUdJTiBSU0EgUFJJVkFURQ==\n",
    "setup.cfg": "[default]\naws_secret_access_key = wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY00\n",
}


@pytest.mark.parametrize("with_git", [False, True])
def test_secrets_never_travel_and_are_named_with_the_reason(folder, tmp_path, with_git):
    for name, content in SECRETS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for name in ("id_rsa.pub", "tokenizer.json", "environment.yaml", "keys.py", "about_secrets.md", "a.env.example"):
        (folder / name).write_text("-----BEGIN PRIVATE KEY----- is how such a file begins")
    if with_git:
        (folder / ".git" / "config").unlink()
        (folder / ".git").rmdir()
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        subprocess.run(["git", "-C", str(folder), "add", "-f", "."], check=True)
    expected = {"recipe.yaml", "notes/a.txt", "id_rsa.pub", "tokenizer.json", "environment.yaml", "keys.py"}
    assert names(folder, tmp_path) == expected | {"about_secrets.md", "a.env.example"}
    package = pack(tmp_path / "job.zip", folder, "/nowhere", {}, [])
    told = {one.name: one.reason for one in package.kept}
    for name in SECRETS:
        reason = told.get(name) or told[name.split("/")[0]]
        assert reason.startswith("secret: "), (name, reason)
    assert "secret: it holds a private key" in told["notes/deploy.txt"]
    assert "secret" in package.staying()[0]  # before what is merely large


@pytest.mark.parametrize("with_git", [False, True])
def test_a_link_takes_nothing_along_from_outside_or_from_what_stays(folder, tmp_path, with_git):
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "diary.txt").write_text("mine")
    (folder / "innocent.txt").symlink_to(outside / "diary.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "env.txt").symlink_to(".env")
    (folder / "again.txt").symlink_to("notes/a.txt")
    (folder / "broken.txt").symlink_to("nowhere")
    if with_git:
        (folder / ".git" / "config").unlink()
        (folder / ".git").rmdir()
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
    assert names(folder, tmp_path) == {"recipe.yaml", "notes/a.txt", "again.txt"}
    told = {one.name: one.reason for one in pack(tmp_path / "job.zip", folder, "/nowhere", {}, []).kept}
    assert told["innocent.txt"] == "a link out of the folder"
    assert told["env.txt"].startswith("a link to .env: secret")
    assert told["broken.txt"] == "not there"
    assert "link" in told["linked"]


def test_a_pipe_does_not_keep_the_client_waiting(folder, tmp_path):
    os.mkfifo(folder / "pipe")
    assert names(folder, tmp_path) == {"recipe.yaml", "notes/a.txt"}


def test_a_dry_run_lists_all_that_travels_and_sends_nothing(folder, tmp_path, monkeypatch, capsys):
    (folder / "id_rsa").write_text("x")
    (folder / "a\x1b[2Jb").write_text("x")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["submit", "quickstart", "--storage", "/shared", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "  notes/a.txt (0.0 KiB)\n" in out
    assert "  workflows/cli.py (" in out
    assert "  id_rsa: secret: id_rsa is named like a private key\n" in out
    assert "\x1b" not in out
    assert out.rstrip().endswith("nothing was sent")


def test_manifests_of_ray_up_leave_the_same_names_out():
    for file in sorted((packing.CODE / "cluster" / "ray").glob("*.yaml")):
        excluded = yaml.safe_load(file.read_text())["rsync_exclude"]
        assert {name for kind in SECRET_NAMES.values() for name in kind} <= set(excluded), file


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"python": "4.0", "packages": {}}, "this code needs 4.0 or newer"),
        ({"python": "3.11", "packages": {"torch": "0", "nowhere-to-be-found": "1"}}, "lacks nowhere-to-be-found in "),
    ],
)
def test_the_first_script_says_what_the_cluster_lacks(wanted, message, tmp_path):
    (tmp_path / "submission.json").write_text(json.dumps({"git": "x", **wanted}))
    (tmp_path / "start.py").write_text(START.read_text())
    done = subprocess.run([sys.executable, tmp_path / "start.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
