"""A server process under load by many clients, malformed requests and clients that leave.

JAXFT_LOAD_SECONDS=600 python -m pytest -m slow -s tests/serve/test_server_load.py prints what ten minutes
of it leave behind.
"""

import json
import os
import subprocess
import sys

import pytest
from scripts_in_process import SCRIPTS
from tiny_llama import tiny_torch, write_folder


@pytest.mark.slow
def test_under_load_no_response_is_wrong_and_nothing_grows(tmp_path):
    pytest.importorskip("uvicorn")
    seconds = os.environ.get("JAXFT_LOAD_SECONDS", "30")
    write_folder(tmp_path / "base", tiny_torch())
    script = SCRIPTS / "bench" / "load_serve.py"
    command = [sys.executable, str(script), "--model", "base", "--seconds", seconds, "--new", "64"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["requests"] > 100 and found["malformed"] > 50 and found["left"] > 10 and found["busy"] > 0
    assert found["wrong"] == found["errors"] == found["compiled"] == 0
    before, begun, after = found["rss_mb"]
    assert after - begun < 40 and found["files"][2] <= found["files"][0]
