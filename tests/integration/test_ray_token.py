"""The Ray that a command starts here takes nobody who has not this user's token, as its ports are open to all."""

import os
import subprocess
import sys

START = """
import subprocess, sys
from workflows.runtime import connect_ray, quiet_libraries

quiet_libraries()
connect_ray()
import ray

address = ray.get_runtime_context().gcs_address
for environment in sys.argv[1:]:
    join = f"import ray; ray.init({address!r}, log_to_driver=False); print('joined')"
    done = subprocess.run(["env", *environment.split(), sys.executable, "-c", join], capture_output=True, text=True)
    print("joined" if "joined" in done.stdout else "refused")
ray.shutdown()
"""


def test_a_stranger_cannot_join(tmp_path):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    (tmp_path / "other").mkdir()
    (tmp_path / "own").mkdir()
    strangers = [f"HOME={tmp_path / 'other'}", f"HOME={tmp_path / 'other'} RAY_AUTH_MODE=disabled"]
    done = subprocess.run(
        [sys.executable, "-c", START, *strangers, f"HOME={tmp_path / 'own'}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=plain | {"HOME": str(tmp_path / "own")},
    )
    assert done.stdout.split()[-3:] == ["refused", "refused", "joined"], done.stderr[-2000:]
