"""Measure speed and memory of SFT or DPO train steps on this machine, and print one JSON line.

    python scripts/bench/bench.py sft --model REF --data rows.jsonl [--rows 64] [--batch 4] [--full] [...]
    python scripts/bench/bench.py dpo --model REF --data pairs.jsonl [--rows 32] [--precompute-ref] [...]
    python scripts/bench/bench.py dpo --model REF --data gsm8k.jsonl --shots 4 --max-length 2048 [...]
    python scripts/bench/bench.py gpu [--tiny]     # random-weight Llamas, see scripts/bench/bench_gpu.py

Rows are {"prompt", "completion"} or GSM8K's {"question", "answer"}, and for dpo {"prompt", "chosen",
"rejected"}, all used as plain text. For dpo, GSM8K rows become pairs: the prompt is --shots solved examples
and a question, and the rejected response ends in a wrong number. It runs the programs of scripts/train.py.

`tokens_per_second` is all tokens divided by all seconds of the steps after the first two. Only tokens of the
rows count, without padding and added EOS; for dpo a prompt counts with each of its two responses.
`peak_rss_gib` is the process's peak reported by the operating system, including loading and compilation; on
an accelerator it is host memory only.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[2])

KINDS = ("none", "int8", "fp8", "int4", "nf4", "fp4", "affine4", "checkpoint")
WARM, LEAST = 2, 6  # untimed steps, and the minimum number of timed steps


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("objective", choices=("sft", "dpo"))
    parser.add_argument("--model", required=True, help="a folder, GGUF file, hub name or pypi:... reference")
    parser.add_argument("--data", required=True, help="a file of rows")
    parser.add_argument("--rows", type=int, default=64, help="number of rows to use (default 64)")
    parser.add_argument(
        "--batch",
        type=int,
        default=4,
        help="packed rows, examples (--no-packing) or pairs per step (default 4)",
    )
    parser.add_argument("--micro", type=int, default=1, help="microbatches per step (default 1)")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--full", action="store_true", help="train all weights instead of LoRA on all linear layers"
    )
    parser.add_argument("--quant", choices=KINDS, default="none", help="quantisation of the frozen base")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="compute dtype (default bf16); trained weights are fp32",
    )
    parser.add_argument("--remat", default="projections", help="remat policy (default projections)")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), default="adamw")
    parser.add_argument(
        "--no-packing", dest="packing", action="store_false", help="one example per row, padded"
    )
    parser.add_argument(
        "--precompute-ref", action="store_true", help="dpo: compute reference log-probs once before training"
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "branches", "plain"),
        default="auto",
        help="dpo: whether prompts are shared",
    )
    parser.add_argument(
        "--shots",
        type=int,
        default=4,
        help="dpo of GSM8K rows: solved examples before each question (default 4)",
    )
    parser.add_argument("--json", action="store_true", help="print only the JSON line, no progress on stderr")
    return parser.parse_args()


def plain_rows(path: str, count: int, shots: int | None) -> list[dict[str, str]]:
    """Return the first `count` rows, as prompt and completion, or as pairs if `shots` is not None (dpo)."""
    from jaxft.data.rows.dataset_rows import read_rows

    fields = [row.fields for row in read_rows(path)[: count + (shots or 0)]]
    if shots is not None and "question" in fields[0]:
        return [_few_shot_pair(fields[i : i + shots], fields[i + shots]) for i in range(len(fields) - shots)]
    fields = fields[:count]
    if "chosen" in fields[0]:
        return [{name: f[name] for name in ("prompt", "chosen", "rejected")} for f in fields]
    if "question" in fields[0]:
        return [{"prompt": f["question"] + "\n", "completion": f["answer"]} for f in fields]
    return [{"prompt": f["prompt"], "completion": f["completion"]} for f in fields]


def _few_shot_pair(examples: list[dict[str, str]], row: dict[str, str]) -> dict[str, str]:
    """Return a pair for a question after solved examples; the rejected answer is the correct one with another
    number at its end.
    """
    solved = "".join(f"{e['question']}\n{e['answer']}\n\n" for e in examples)
    wrong = re.sub(r"(\d)$", lambda m: str((int(m[1]) + 1) % 10), row["answer"])
    return {"prompt": f"{solved}{row['question']}\n", "chosen": row["answer"], "rejected": wrong}


def make_run(a: argparse.Namespace, data: Path) -> Any:
    """Return the Run of the baseline: AdamW, lr 1e-4 decaying linearly to 0, no warm-up, clipping at 1."""
    import jax.numpy as jnp

    from jaxft.data.pairs import PairRows
    from jaxft.data.sft import Rows
    from jaxft.nn.adapters.lora import Adapter
    from jaxft.nn.quant import Quant
    from jaxft.objectives.losses.preference_losses import dpo
    from jaxft.objectives.preference import preference
    from jaxft.objectives.sft import sft
    from jaxft.optim import optimizer, rules, schedules
    from jaxft.train.settings import Run
    from jaxft.weights import pretrained

    dtype = {"bf16": jnp.bfloat16, "fp32": jnp.float32}[a.dtype]
    rows = {"max_length": a.max_length, "batch": a.batch, "micro": a.micro, "held_out": None}
    if a.objective == "dpo":
        reference: Any = "precomputed" if a.precompute_ref else "start"
        data_rows: Any = PairRows(str(data), format="plain", layout=a.layout, **rows)
        kind = {
            "objective": partial(preference, loss=dpo, reference=reference),
            "data": data_rows,
        }
    else:
        kind = {
            "objective": sft,
            "data": Rows(str(data), format="plain", packing=a.packing, **rows),
        }
    return Run(
        name="bench",
        weights=a.model,
        model=pretrained.model_for(a.model, dtype=dtype, remat=a.remat),
        adapter=None if a.full else Adapter(rank=a.rank, alpha=2.0 * a.rank),
        quant=None if a.quant == "none" else Quant(a.quant),
        optim=optimizer.Optim(
            lr=1e-4,
            optimizer=getattr(rules, a.optimizer),
            schedule=schedules.linear_schedule,
            warmup=0.0,
            end=0.0,
            clip=1.0,
        ),
        **kind,
    )


def batches(rows: int, per_epoch: int, batch: int) -> list[int]:
    """Return the indices of the batches to run: the full ones, for as many epochs as give LEAST timed steps.

    rows: of the dataset. per_epoch: batches of an epoch. batch: rows of a full one.
    """
    full = rows // batch
    if not full:
        raise ValueError(
            f"{rows} rows do not fill a batch of {batch}; use a larger --rows or a smaller --batch"
        )
    epochs = -(-(WARM + LEAST) // full)
    return [epoch * per_epoch + k for epoch in range(epochs) for k in range(full)]


def useful(batch: Any, eos: int) -> int:
    """Count a batch's tokens without padding and EOS. In a pair, the prompt counts with each response."""
    from jaxft.batch import Pairs

    if isinstance(batch, Pairs):
        first = (batch.offsets == 0) & (batch.responses < batch.lengths[0, 0].size)
        prompts = np.take_along_axis(batch.positions, batch.read, -1)[first] + 1
        return int(prompts.sum() + batch.lengths.sum() - (batch.lengths > 0).sum())
    return int(((batch.segments > 0) & (batch.ids != eos)).sum())


def measure(run: Any, report: Any) -> dict[str, Any]:
    """Load, compile and train; return the measured fields of the JSON line."""
    import jax

    from jaxft.distributed import sharding
    from jaxft.objectives import metrics
    from jaxft.train import programs
    from jaxft.train.start import reference_logprobs
    from jaxft.weights import pretrained

    mesh = sharding.make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        tokenizer = pretrained.load_tokenizer(run.weights)
        source = run.data.open(tokenizer, sharding.row_shards(mesh), Path(run.data.train).parent)
        stats = source.info.stats
        count = stats.examples if run.data.unit == "pairs" else stats.rows
        steps = batches(count, source.info.steps_per_epoch, run.data.batch)
        p = programs.build(run, len(steps))
        state, frozen = programs.start(run, p, None)
        jax.block_until_ready((state, frozen))
        report(f"loaded, peak {peak_gib():.2f} GiB")
        if p.objective.facts.reference == "precomputed":
            since = time.perf_counter()
            source = reference_logprobs.add_reference_logps(
                run, p, source, {"weights_fingerprint": str(time.time())}, report
            )
            report(f"reference log-probs in {time.perf_counter() - since:.1f} s")
        begin = time.perf_counter()
        step = programs.compile_step(p, source.shapes[-1])
        compiled = time.perf_counter() - begin
        report(f"compiled in {compiled:.1f} s, peak {peak_gib():.2f} GiB")
        seconds, tokens, losses = [], [], []
        begin = time.perf_counter()
        for number in steps:
            since = time.perf_counter()
            batch, _ = source.batch(number, state)
            state, step_metrics = step(state, frozen, sharding.shard_batch(p.mesh, batch))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - since)
            tokens.append(useful(batch, tokenizer.eos_token_id))
            losses.append(metrics.as_floats(step_metrics)["loss"])
            report(
                f"step {len(losses)}/{len(steps)}: loss {losses[-1]:.4f}, "
                f"{tokens[-1] / seconds[-1]:.0f} tokens/s"
            )
    return {
        "steps": len(seconds),
        "timed_steps": len(seconds[WARM:]),
        "tokens_per_second": round(sum(tokens[WARM:]) / sum(seconds[WARM:]), 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "loss": round(sum(losses) / len(losses), 4),
        "compile_seconds": round(compiled, 1),
    }


def peak_gib() -> float:
    """Return the peak resident memory of this process in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def commit() -> str | None:
    """Return the checked-out commit, with + if files differ from it; None outside a repository."""
    command = ["git", "-C", sys.path[0], "describe", "--always", "--abbrev=10", "--dirty=+", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    """Measure, and print the JSON line."""
    if sys.argv[1:2] == ["gpu"]:
        return subprocess.run(
            [sys.executable, Path(__file__).with_name("bench_gpu.py"), *sys.argv[2:]], check=False
        ).returncode
    a = arguments()
    report = (lambda _: None) if a.json else (lambda text: print(text, file=sys.stderr, flush=True))
    with tempfile.TemporaryDirectory() as folder:
        data, shots = Path(folder) / "rows.jsonl", a.shots if a.objective == "dpo" else None
        data.write_text("".join(json.dumps(row) + "\n" for row in plain_rows(a.data, a.rows, shots)))
        measured = measure(make_run(a, data), report)
    import jax

    about = {
        "peer": "jaxft",
        "objective": a.objective,
        "mode": "full" if a.full else f"lora-r{a.rank}",
        **({"quant": a.quant} if a.quant != "none" else {}),
        "dtype": a.dtype,
        "packing": a.packing,
    }
    rest = {
        "peak_rss_gib": round(peak_gib(), 2),
        "remat": a.remat,
        **(
            {"precompute_ref": a.precompute_ref, "layout": a.layout, "shots": a.shots}
            if a.objective == "dpo"
            else {}
        ),
        "optimizer": a.optimizer,
        "batch": a.batch,
        "micro": a.micro,
        "max_length": a.max_length,
        "commit": commit(),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    print(json.dumps({**about, **measured, **rest}))
    return 0


if __name__ == "__main__":
    from jaxft.distributed import xla_flags
    from jaxft.runs.terminal import one_line_errors

    xla_flags.restart()  # as a run does
    xla_flags.apply_settings()
    sys.exit(one_line_errors(main))
