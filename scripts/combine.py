"""Write a weighted combination of LoRA adapters as one adapter.

    python scripts/combine.py runs/a runs/b --weights 0.7,0.3 --out both
    python scripts/combine.py A B C --weights 1,1,-0.5 --method cat --out all
    python scripts/combine.py A B --weights 1,1 --method ties --density 0.3 --out merged

A, B are runs or adapter folders in PEFT's layout, on one base model; if their files name the base
differently, give it by --model. Methods are named as in PEFT's add_weighted_adapter: cat is the exact sum,
whose rank is the sum of the ranks; svd (the default) reduces the sum to --rank, by default the largest rank
of the adapters, and prints the error; linear, ties, dare_linear and dare_ties combine LoRA's matrices A and B
separately and need equal ranks. Weights may be negative.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

METHODS = ("svd", "cat", "linear", "ties", "dare_linear", "dare_ties")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.annotations import PositiveFraction
    from jaxft.cli.cli import COUNT, SEED, Bounded, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("adapters", nargs="+", type=Path, help="runs, or adapter folders in PEFT's layout")
    parser.add_argument("--weights", required=True, help="a number for each adapter, separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--method", choices=METHODS, default="svd", help="the formula (default svd)")
    parser.add_argument("--rank", type=COUNT, help="rank for svd (default the largest rank of the adapters)")
    parser.add_argument(
        "--density", type=Bounded(PositiveFraction), help="fraction that ties and dare keep (default 0.5)"
    )
    parser.add_argument("--seed", type=SEED, help="random seed of the dare methods (default 0)")
    parser.add_argument("--model", help="the base (default the one that all adapters name)")
    return parser


def numbers(text: str) -> tuple[float, ...]:
    """Parse the value of --weights, such as "0.7,0.3". Raises ValueError for anything but numbers."""
    try:
        return tuple(float(weight) for weight in text.split(","))
    except ValueError:
        raise ValueError(f"--weights {text}: expected numbers separated by commas, such as 0.7,0.3") from None


def main() -> int:
    """Combine, write, and print a summary."""
    parser = make_parser()
    args = parser.parse_args(_joined(sys.argv[1:]))
    from jaxft.runs.loaded_weights import named_weights
    from jaxft.runs.run_record import check_results, earlier_end_notes
    from jaxft.weights import pretrained
    from jaxft.weights.edit import new_adapters
    from jaxft.weights.peft import adapter_folders, peft_config, peft_read

    how = new_adapters.Combination(args.method, numbers(args.weights), args.density, args.rank, args.seed)
    folders = [adapter_folders.adapter_folder(str(folder)) for folder in args.adapters]
    adapter_folders.check_adapter_output(args.out, folders)
    named = named_weights(None, args.model, args.adapters[0])
    notes = list(named.notes)
    for folder in folders[1:]:
        check_results(folder)
        notes += earlier_end_notes(folder)
        others = adapter_folders.other_base_name(folder, named.ref)
        if others and args.model is None:
            name = peft_config.read_adapter_config(folder)["base_model_name_or_path"]
            raise ValueError(
                f"{folder}: the base of this adapter is {name}, but that of {folders[0]} is {named.ref}; "
                "only adapters of the same base can be combined; if both names mean one model, set --model"
            )
        notes += others
    for line in notes:
        print(line, file=sys.stderr)
    model = pretrained.model_for(named.ref)
    files, read = pretrained.open_files(named.ref), []
    for given, folder in zip(args.adapters, folders, strict=True):
        read.append(new_adapters.NamedAdapter(str(given), *peft_read.read_adapter(folder, model, files)))
        if peft_read.has_base_copies(folder):
            pretrained.check_adapter_base(folder, named.ref)
    made = new_adapters.combine_adapters(read, model, how)
    parts = ", ".join(f"{w:g} {given}" for w, given in zip(how.weights, args.adapters, strict=True))
    text = f"A combination of LoRA adapters ({how.method}: {parts}), written by jaxft."
    tokenizer = folders[0] if (folders[0] / "tokenizer_config.json").is_file() else None
    new = adapter_folders.NewAdapter(made.params, made.settings, named.ref, text, tokenizer)
    adapter_folders.write_adapter(args.out, new, model)
    lost = f"; the reduction to this rank dropped {100 * made.dropped:.2f} % of the sum"
    print(
        f"{args.out}: {how.method} of {parts}, rank {made.settings.rank}{lost if how.method == 'svd' else ''}"
    )
    for line in adapter_folders.cached_base_notes(args.out, named.ref):
        print(line)
    return 0


def _joined(argv: list[str]) -> list[str]:
    """Return argv with `--weights -1,2` as `--weights=-1,2`; argparse would read -1,2 as an option."""
    out = list(argv)
    for at, ref in enumerate(out[:-1]):
        if ref == "--weights":
            out[at : at + 2] = [f"--weights={out[at + 1]}"]
            break
    return out


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
