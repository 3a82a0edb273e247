"""Show which training pairs help the held-out pairs and which harm them, such as wrong labels.

    python scripts/train.py --config configs/dpo.py data=pairs.jsonl name=first
    python scripts/influence.py --config configs/dpo.py data=pairs.jsonl name=first
    python scripts/influence.py dpo data=pairs.jsonl name=first --keep 0.5 --out best.jsonl
    python scripts/influence.py dpo data=a.jsonl,b.jsonl,c.jsonl --leave-out
    python scripts/influence.py dpo data=a.jsonl,b.jsonl,c.jsonl --through 4

Give the recipe and settings as for `train`. It reads the newest checkpoint of runs/<name>, or the model at
step 0 without one. A row's influence is the margin that all other rows, held-out ones included, predict for
it from their gradients: below 0 its label is probably wrong. That takes less than half an epoch of training.
With --gradients it is the cosine of the gradients of the losses, for any loss, and rows that repeat one
another are found; it takes longer than an epoch. With --leave-out an adapter is trained without each source,
and one with all of them, together in one program. With --through STEPS the held-out loss after so many
steps of training is differentiated with respect to the weights of the sources, and weights that lower it are
fitted by gradient descent: with SmolLM2-135M, 2 steps of 4 pairs and 16 held-out pairs in 12 minutes and 2.5
GB on two busy cores. runs/<name>/influence.csv has all influences; --keep writes the rows of highest
influence.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

SHOWN = 10  # rows of each kind that are printed


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.annotations import PositiveFraction
    from jaxft.cli.cli import COUNT, Bounded, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument(
        "--config", metavar="RECIPE", help="a recipe such as dpo, or a Python file with config(...) -> Run"
    )
    parser.add_argument(
        "--gradients", action="store_true", help="by the gradients of the losses; also finds duplicates"
    )
    parser.add_argument(
        "--leave-out", action="store_true", help="train without each source: what each of them changes"
    )
    parser.add_argument(
        "--through", type=COUNT, metavar="STEPS", help="weights of the sources, by gradients through training"
    )
    parser.add_argument(
        "--keep", type=Bounded(PositiveFraction), help="the fraction of the training rows to write to --out"
    )
    parser.add_argument(
        "--out", type=Path, help="file for the rows of highest influence (default: in the run)"
    )
    parser.add_argument("overrides", nargs="*", help="the recipe, then knob=value or section.field=value")
    return parser


def lines_of(influence: Any) -> list[str]:
    """Return lines: the rows with the lowest influence, and the mean influence of each file of rows."""
    harmful = [i for i in influence.order if influence.values[i] < 0]
    lines = [f"{len(harmful)} of {len(influence.names)} training rows have an influence below 0"]
    lines += [f"  {influence.values[i]:+.3g}  {influence.names[i]}" for i in harmful[:SHOWN]]
    means = influence.by_file()
    if len(means) > 1:
        lines += ["mean influence of each source:", *(f"  {x:+.3g}  {name}" for name, x in means.items())]
    return lines


def duplicate_lines(gradients: Any) -> list[str]:
    """Return lines about pairs of training rows that repeat each other, by the cosine of their gradients."""
    same, names = gradients.duplicates(), gradients.names
    if not same:
        return ["no rows repeat one another"]
    lines = [f"{len(same)} pairs of rows repeat one another (cosine of their gradients):"]
    return lines + [f"  {x:+.3f}  {names[i]} and {names[j]}" for i, j, x in same[:SHOWN]]


def leave_out(run: Any) -> int:
    """Train without each source, and print the changes of the held-out loss."""
    from jaxft.lab.influence import train_without_sources

    effects = train_without_sources(run)
    print("\nheld-out loss without a source minus the loss with all; above 0 the source helps:")
    print("\n".join(f"  {effect.text()}" for effect in effects))
    return 0


def weigh(parts: Any, steps: int) -> int:
    """Print, for each source of rows, the derivative of the held-out loss after `steps` training steps with
    respect to the source's weight, and the weight that is fitted to lower this loss. Return the exit code.

    parts: the return value of jaxft.prepare.
    """
    import jax.numpy as jnp

    from jaxft.lab.training_gradients import (
        TrainingNumbers,
        fit_source_weights,
        held_out_gradient,
        short_training,
    )

    training = short_training(parts, steps, parts.run.optim.lr)
    names = training.batches.source_names
    weights = fit_source_weights(training, rounds=12)[-1]
    at = TrainingNumbers({}, jnp.full(len(names), 1 / len(names)))
    slopes = held_out_gradient(training, at).weights
    print(f"\nd(held-out loss after {steps} steps)/d(weight) at equal weights, and fitted weights:")
    for slope, weight, name in sorted(zip(slopes.tolist(), weights, names, strict=True), reverse=True):
        print(f"  {slope:+.3g}  {weight:.3f}  {name}")
    return 0


def main() -> int:
    """Compute the influence of all training rows, print the extremes, and write the files."""
    args = make_parser().parse_intermixed_args()
    if args.out and args.keep is None:
        raise ValueError("--out needs --keep, the fraction of the rows to write; add --keep 0.5")
    for option, given in {"--leave-out": args.leave_out, "--through": args.through is not None}.items():
        if given and (args.keep is not None or args.gradients):
            raise ValueError(f"{option} compares sources, not rows; leave out --keep, --out and --gradients")
    if args.through is not None:
        if args.leave_out:
            raise ValueError("--through and --leave-out are two ways to judge sources; use one of them")
        os.environ["JAXFT_ATTENTION"] = "reference"  # which has a second derivative
    from jaxft.cli import cli
    from jaxft.distributed import processes
    from jaxft.lab.influence import check_is_of_pairs, gradients_of_rows, margins_of_rows, rows_by_name
    from jaxft.train.python_api import prepare_run
    from jaxft.train.start import open_settings
    from jaxft.train.start.jobs import run_folder

    processes.require_single_process("influence")
    recipe, overrides = cli.recipe_and_overrides(args.config, args.overrides)
    unfitted = open_settings.resolve(recipe, overrides)
    check_is_of_pairs(unfitted.value.data)
    resolved, notes = open_settings.fitted(unfitted)
    print("\n".join(notes), end="\n" * bool(notes), flush=True)
    if args.leave_out:
        return leave_out(resolved.value)
    folder = run_folder(resolved.value, Path("runs"))
    parts = prepare_run(resolved.value, resolved.describe(), folder)
    if args.through is not None:
        return weigh(parts, args.through)
    step = int(parts.state.step)
    print(f"gradients of {folder} at step {step}" if step else f"{folder} has no checkpoint: step 0")
    if args.gradients:
        gradients = gradients_of_rows(parts)
        influence, more = gradients.influence, duplicate_lines(gradients)
    else:
        influence, more = margins_of_rows(parts), []
    print("\n".join([*lines_of(influence), *more]))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "influence.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("row", "influence"))
        table.writerows((influence.names[i], influence.values[i]) for i in influence.order)
    print(f"\n{folder / 'influence.csv'}")
    if args.keep is not None:
        rows, out = rows_by_name(resolved.value.data.train), args.out or folder / "best.jsonl"
        kept = influence.subset(args.keep)
        lines = [json.dumps(rows[influence.names[i]], ensure_ascii=False, default=str) for i in kept]
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out}: the {len(kept)} of {len(influence.names)} rows of highest influence")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    terminal.outlive_console()
    sys.exit(terminal.one_line_errors(main))
