"""What the train loop imports: nothing that only some runs need, and never torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LATER = {"torch", "transformers", "tokenizers", "datasets", "pandas", "pyarrow", "matplotlib", "gguf"}
LATER |= {"tensorboardX", "wandb", "trackio", "mlflow", "plotly", "scipy", "flax.nnx"}


def test_the_train_loop_imports_nothing_that_only_some_runs_need():
    code = f"import sys, jaxft.train.loop; print(sorted({LATER} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
