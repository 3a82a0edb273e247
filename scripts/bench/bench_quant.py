"""Measure the perplexity of a model in each quantised format on your rows, as a table or one JSON line.

    python scripts/bench/bench_quant.py --model REF --data gsm8k.jsonl [--kinds none int8 nf4 int4:128]

Rows have the formats of scripts/bench/bench.py sft. Perplexity is over all tokens, prompt and completion, and
compared with the first kind's. KIND:BLOCK sets the block size. fp8 dequantises weights where the device
has no FP8 matmuls; fp8+matmul emulates these, with activations rounded to FP8. KIND+calibrated rounds as
quant.calibrate does, on the rows of --calibrate, which have the formats of --data and are read as plain text.
`error` is the relative root mean square error of a quantised weight. A model whose weights come from 4-bit
files is on a grid already, so a second format changes it more than other models.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

CALIBRATED = "+calibrated"
MATMUL = "+matmul"  # multiply FP8 weights in FP8, emulated where the device has no such matmuls
KINDS = (
    "none",
    "int8",
    "fp8",
    "fp8" + MATMUL,
    "int4",
    "int4:128",
    "nf4",
    "fp4",
    "affine4:32",
    "affine4",
    "affine4:128",
)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, GGUF file, hub name or pypi:... reference")
    parser.add_argument("--data", required=True, help="a file of rows")
    parser.add_argument("--rows", type=int, default=64, help="number of rows to use (default 64)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=KINDS,
        metavar="KIND[:BLOCK]",
        help=f"formats (default {' '.join(KINDS)})",
    )
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--calibrate", metavar="FILE", help="rows for KIND+calibrated, such as the next ones")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens (default 16384)")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    return parser.parse_args()


def quant_of(kind: str) -> Any:
    """Parse KIND, KIND:BLOCK, KIND+matmul or KIND+calibrated; None for `none`."""
    from jaxft.nn.quant import Quant

    name, _, block = kind.removesuffix(MATMUL).removesuffix(CALIBRATED).partition(":")
    in_fp8 = True if kind.endswith(MATMUL) else None
    return None if name == "none" else Quant(name, int(block) if block else None, fp8_matmul=in_fp8)


def calibrated(a: argparse.Namespace, quant: Any) -> Any:
    """Return the quantisation with codes that are calibrated on the rows of --calibrate."""
    from jaxft.train.export.calibrate import Calibration, calibrated_codes, plan_file
    from jaxft.weights import pretrained

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    rows = Calibration(a.calibrate, tokens=a.tokens, max_length=a.max_length, format="plain")
    plan = plan_file(a.model, quant, rows, pretrained.load_tokenizer(a.model), progress)
    calibrated_codes(plan, progress)
    return plan.coded


def measure(a: argparse.Namespace, data: Path) -> list[dict[str, Any]]:
    """Return perplexity and error of each kind. data: the rows, prepared as a file."""
    import jax
    import numpy as np

    from jaxft.data.sft import Rows
    from jaxft.distributed import sharding
    from jaxft.nn import quant
    from jaxft.objectives.sft import sft
    from jaxft.train.evaluate import evaluate
    from jaxft.weights import pretrained

    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        model = pretrained.model_for(a.model)
        rows = Rows(
            str(data),
            held_out=str(data),
            format="plain",
            loss_on="all",
            max_length=a.max_length,
            batch=4,
        )
        batches = rows.open(pretrained.load_tokenizer(a.model), cache=data.parent).held_out
        objective = sft(model)
        step = jax.jit(lambda base, batch: objective(base, jax.tree.map(lambda x: x[0], batch), None, {})[1])
        plain: Any = None
        results_of_kinds: list[dict[str, Any]] = []
        for kind in a.kinds:
            stored = quant_of(kind)
            stored = calibrated(a, stored) if kind.endswith(CALIBRATED) else stored
            base = pretrained.load_frozen(a.model, model, mesh, stored)
            loss = evaluate.evaluate(partial(step, base), batches)["loss"]
            packed = base["layers"]["mlp"]["down"]
            values = np.asarray(quant.dequantize(packed), np.float32)
            plain = values if plain is None else plain
            error = float(np.sqrt(np.square(values - plain).mean() / np.square(plain).mean()))
            ratio = float(np.exp(loss - (results_of_kinds[0]["loss"] if results_of_kinds else loss)))
            results = {
                "bits": quant.bits_per_param(packed),
                "perplexity": float(np.exp(loss)),
                "ratio": ratio,
                "error": error,
            }
            results_of_kinds.append(
                {"kind": kind, "loss": loss, **{name: round(x, 4) for name, x in results.items()}}
            )
            print(f"{kind}: loss {loss:.4f}", file=sys.stderr)
    return results_of_kinds


def main() -> int:
    """Measure, and print a table or JSON."""
    a = arguments()
    from scripts.bench.bench import plain_rows

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in plain_rows(a.data, a.rows, None)))
        if a.calibrate:
            rows = plain_rows(a.calibrate, sys.maxsize, None)
            a.calibrate = str(Path(folder) / "calibrate.jsonl")
            Path(a.calibrate).write_text("".join(json.dumps(row) + "\n" for row in rows))
        kinds = measure(a, data)
    if a.json:
        print(json.dumps({"model": a.model, "rows": a.rows, "kinds": kinds}))
        return 0
    print(f"{'':14s} {'bits':>6s} {'perplexity':>11s} {'over ' + kinds[0]['kind']:>10s} {'error':>7s}")
    for f in kinds:
        over, error = f"{100 * (f['ratio'] - 1):+.2f}%", f"{100 * f['error']:.2f}%"
        print(f"{f['kind']:14s} {f['bits']:6.3f} {f['perplexity']:11.3f} {over:>10s} {error:>7s}")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
