"""What a run imports before its first step: nothing that only some runs need, and never torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LATER = {"torch", "transformers", "tokenizers", "datasets", "pandas", "pyarrow", "matplotlib", "gguf"}
LATER |= {"tensorboardX", "wandb", "trackio", "scipy", "flax.nnx"}


def test_the_train_loop_and_its_log_import_nothing_that_only_some_runs_need(tmp_path):
    code = (
        "import sys; from pathlib import Path; import jaxft.train.loop;"
        "from jaxft.runs.log import Log; Log(Path(sys.argv[1]), 1, quiet=True).close();"
        f"print(sorted({LATER} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
