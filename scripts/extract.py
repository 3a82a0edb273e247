"""Write a LoRA adapter that turns one model into another: the low-rank part of their difference.

    python scripts/extract.py BASE TUNED --rank 32 --out adapter
    python scripts/extract.py BASE TUNED --rank 16 --targets q_proj,v_proj --out adapter
    python scripts/extract.py BASE TUNED --rank 32 --save-others --out adapter   # norms and others too

BASE, TUNED are Hugging Face models (org/name), folders or .gguf files of one architecture. For each kind of
matrix it prints the size of the change relative to the base, and the error: the part of the change that the
adapter lacks. A model that was tuned with LoRA of rank R has an error near 0 at that rank. Memory holds
two matrices and the adapter.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import COUNT, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("base", help="the model that the adapter will be used on")
    parser.add_argument("tuned", help="the fine-tuned model")
    parser.add_argument("--rank", type=COUNT, required=True, help="rank of every pair")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--targets", default="all-linear", help="module names, as adapter.targets")
    parser.add_argument(
        "--save-others", action="store_true", help="store other changed parameters in full (modules_to_save)"
    )
    return parser


def main() -> int:
    """Extract, write, and print the errors."""
    args = make_parser().parse_args()
    from jaxft.weights import pretrained
    from jaxft.weights.edit import new_adapters
    from jaxft.weights.hf.hub import locate
    from jaxft.weights.hf.model_card import base_name
    from jaxft.weights.peft import adapter_folders

    names = tuple(name.strip() for name in args.targets.split(",") if name.strip())
    targets = args.targets if args.targets == "all-linear" or "*" in args.targets else names
    what = new_adapters.Extraction(args.rank, targets, args.save_others)
    inputs = [locate(ref).path for ref in (args.base, args.tuned)]
    adapter_folders.check_adapter_output(args.out, inputs)
    model = pretrained.model_for(args.base)
    extracted = new_adapters.extract_adapter(
        args.base, args.tuned, model, what, lambda line: print(line, file=sys.stderr, flush=True)
    )
    text = (
        f"A LoRA adapter (rank {args.rank}) extracted from the difference between "
        f"`{base_name(args.tuned)}` and `{base_name(args.base)}`, written by jaxft."
    )
    tokenizer = inputs[1] if (inputs[1] / "tokenizer_config.json").is_file() else None
    new = adapter_folders.NewAdapter(extracted.params, extracted.settings, args.base, text, tokenizer)
    adapter_folders.write_adapter(args.out, new, model)
    width = max(len(error.path) for error in extracted.errors)
    for error in extracted.errors:
        print(f"{error.path:{width}}  change {100 * error.change:.3g} %  error {100 * error.error:.3g} %")
    for line in [*extracted.others, *adapter_folders.cached_base_notes(args.out, args.base)]:
        print(line)
    print(f"{args.out}: adapter of rank {args.rank} for {args.base}")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
