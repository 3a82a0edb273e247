"""The table of what fits where, which scripts/bench/fits.py writes."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

from jaxft.plan import machines

ROOT = Path(__file__).resolve().parents[2]


def test_the_default_table_has_all_cells_and_no_program_depends_on_the_planner():
    fits = runpy.run_path(str(ROOT / "scripts" / "bench" / "fits.py"))
    cells = list(fits["cells_of"](fits["arguments"]([])))
    assert [c for c in cells if c[1] == "405B"] == [("v5p", "405B", "LoRA", "sft")]
    others = len(fits["MODELS"]) - len(fits["ONLY"])
    assert len(set(cells)) == len(cells) == others * 3 * 2 * len(fits["HARDWARE"]) + 1
    package = ROOT / "jaxft"
    assert "plan" in fits["PLANNER"] and all((package / part).exists() for part in fits["PLANNER"])
    for path in package.rglob("*.py"):
        if not any(path.is_relative_to(package / part) for part in fits["PLANNER"]):
            assert not re.search(
                r"^(from jaxft import .*\bplan\b|from jaxft\.plan\b)", path.read_text(), re.M
            ), path


def test_the_table_of_fits_merges_files_and_counts_outdated_cells(tmp_path):
    cell = {"fits": True, "total": 3 * machines.GIB, "devices": 1, "source": "older"}
    for name, key in (("a", "h100:1 1B LoRA sft"), ("b", "v5e:2x2 1B LoRA sft")):
        devices_ = 4 if name == "b" else 1
        (tmp_path / f"{name}.json").write_text(json.dumps({key: {**cell, "devices": devices_}}))
    small = {**cell, "fits": False, "total": None}
    (tmp_path / "all.json").write_text(json.dumps({"v5e:1x1 1B LoRA sft": small}))
    command = [sys.executable, "scripts/bench/fits.py", "--out", str(tmp_path / "all.json"), "--models", "1B"]
    added = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    done = subprocess.run([*command, "--add", *added], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| Llama-3.2-1B | LoRA | SFT |  |  | 3.0 | 3.0 × 4 |  |  |" in done.stdout
    assert "3 of 3 programs were compiled with an older jax or older code" in done.stdout
    assert set(json.loads((tmp_path / "all.json").read_text())) == {
        "v5e:1x1 1B LoRA sft", "h100:1 1B LoRA sft", "v5e:2x2 1B LoRA sft"
    }  # fmt: skip
