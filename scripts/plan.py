"""Plan a run for a machine that you do not have: memory, traffic and time of its compiled programs.

    python scripts/plan.py --config configs/llama31_8b_sft.py --devices h100:1 quant=nf4 batch=1 micro=1
    python scripts/plan.py --config configs/llama31_8b_sft.py --devices l4 --price 0.8 quant=nf4 data=a.jsonl
    python scripts/plan.py        # which models and methods fit which hardware, without any extra
    python scripts/plan.py --config configs/llama31_8b_sft.py --devices v5p:4x4x4 full=true batch=64 micro=1
    python scripts/plan.py --config configs/llama31_8b_sft.py --devices h100:8 --search full=true batch=32
    python scripts/plan.py --config configs/llama31_8b_sft.py --devices v5p:2x2x2 v5p:4x4x4 full=true \\
        batch={devices} micro=1

No weights or devices are used. Rows are read only from data=FILE, to plan for their lengths, and for --hours
and --price; for other rows, lengths are chosen when the run starts. Nothing is downloaded but the
configuration of model=org/name, and for --hours and --price a dataset on the hub. Compiling for NVIDIA GPUs
needs jax's CUDA plugin (pip install 'jaxft[cuda12]'), for TPUs libtpu (pip install 'jaxft[tpu]').

All programs of the run are compiled: the train step, evaluation, sampling and others. --train-only, several
machines and --search compile only the train step.

--devices: h100:1 is one GPU, h100:8 a host with eight, h100:2x8 two such hosts, v5e:4x4 a TPU slice,
2xv5e:4x4 two slices. Chips are t4, l4, a10g, rtx3090, rtx4090, rtx5090, l40s, a100-40, a100-80, h100, h200,
b200, mi300x (its program is an H200's), v5e, v5p and v6e, in any spelling; 24gb is a GPU of that memory.
Several machines are compared in a table; {devices} in an override is the number of devices. --search exits
with 1 if no choice fits.

--hours prints the hours of the run, from its steps: its rows and epochs, or loop.steps. --price adds their
cost, for a price per device and hour in any currency.

--quick compiles TPU programs with little optimisation, in a tenth of the time. On several chips such a
program needs up to a sixth less memory; start the run with JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 to get it.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.annotations import NonNegativeFloat
    from jaxft.cli.cli import COUNT, Bounded, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument(
        "--config", metavar="RECIPE", help="a recipe such as sft, or a file with config(...) -> Run"
    )
    parser.add_argument("--devices", nargs="+", help="one or several machines, such as h100:1, 3090 or 24gb")
    parser.add_argument("--hours", action="store_true", help="print the hours of the run, for its rows")
    parser.add_argument(
        "--price", type=Bounded(NonNegativeFloat), help="price per device and hour: print hours and cost"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line per plan, in bytes and seconds"
    )
    parser.add_argument("--train-only", action="store_true", help="compile only the train step")
    parser.add_argument("--quick", action="store_true", help="for TPUs: compile in a tenth of the time")
    parser.add_argument(
        "--search", action="store_true", help="recommend the fastest microbatches, remat policy and mesh"
    )
    parser.add_argument(
        "--most", type=COUNT, default=12, help="most choices that --search compiles (default 12)"
    )
    parser.add_argument("overrides", nargs="*", help="the recipe, then knob=value or section.field=value")
    return parser


def main() -> int:
    """Compile the programs and print the plans."""
    parser = make_parser()
    args = parser.parse_intermixed_args()
    if args.search and (args.hours or args.price is not None):
        parser.error("--hours and --price are for one choice of settings; leave out --search")
    of_a_run = args.config or args.overrides or args.hours or args.price is not None
    if args.devices is None and of_a_run:
        parser.error("the following arguments are required: --devices, such as h100:1 or 24gb")
    if args.devices is None:
        from jaxft.plan.machines import fits_report

        print(fits_report())
        return 0
    from jaxft.train.recipes import without_model_weights

    with without_model_weights():
        return print_plans(args)


def print_plans(args: argparse.Namespace) -> int:
    """Compile and print what the command line names; return the exit code."""
    from jaxft.cli import cli
    from jaxft.plan import machines, plan, plan_report, search
    from jaxft.runs.settings import config
    from jaxft.train.start import open_settings

    plan.set_quick(args.quick)
    names = [name for name in args.devices if "=" not in name]  # overrides may follow --devices
    recipe, overrides = cli.recipe_and_overrides(args.config, args.overrides)
    knobs = list(config.recipe_knobs(recipe))
    overrides = [*(name for name in args.devices if "=" in name), *overrides]
    if not names:
        raise ValueError(f"--devices has no machine, got {' '.join(args.devices)}; add one such as h100:8")
    train_plans: list[plan.Plan] = []
    code = 0
    for machine in [machines.machine(name) for name in names]:  # before any program is compiled
        given = [text.replace("{devices}", str(len(machine.devices))) for text in overrides]
        settings, lines = open_settings.fitted_here(
            open_settings.resolve(recipe, given), len(machine.devices)
        )
        given += [f"{key}={value}" for key, value in settings.chosen.items()]
        for line in lines:
            print(line, file=sys.stderr, flush=True)
        if args.search:
            load = partial(config.load_config, recipe)
            command = search.Command(load, given, knobs)
            tried = search.search(command, machine, args.most, partial(print, file=sys.stderr, flush=True))
            print(
                json.dumps([t.json(command) for t in tried])
                if args.json
                else search.search_report(tried, command),
                flush=True,
            )
            code = code if search.any_fits(tried) else 1
            continue
        train_only = args.train_only or len(names) > 1
        select = plan.train_programs if train_only else plan.all_programs
        run = config.load_config(recipe, given)
        each = plan.plans(run, machine, select)
        train_plans.append(next(p for p in each if p.flops is not None))  # the largest train step
        cost = run_cost(run, train_plans[-1], args.price) if args.hours or args.price is not None else None
        record = {**plan_report.record(train_plans[-1], each), **(cost.json() if cost else {})}
        print(json.dumps(record) if args.json else plan_report.plan_report(train_plans[-1]), flush=True)
        if (args.hours or args.price is not None) and not args.json:
            print("\n".join(cost.lines() if cost else plan_report.unknown_lines(train_plans[-1])), flush=True)
        if len(each) > 1 and not args.json:
            print(plan_report.programs_report(each), flush=True)
    if len(train_plans) > 1 and not args.json:
        print(plan_report.scaling_report(train_plans))
    return code


def run_cost(run: Any, step: Any, price: float | None) -> Any:
    """Return the plan_report.Cost of a run, None if the time of a step is unknown. step: the plan of its
    train step. price: per device and hour.
    """
    from jaxft.plan import plan_report
    from jaxft.weights import pretrained
    from jaxft.weights.hf import hub

    if step.estimate is None:
        return None

    def tokenizer() -> Any:
        if not hub.is_here(run.weights):
            raise OSError(f"{run.weights} is not on this machine")  # a plan downloads nothing
        return pretrained.load_tokenizer(run.weights)

    steps = plan_report.steps_of(run, tokenizer)
    return plan_report.Cost(steps, step.estimate.step, step.devices, price)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # local accelerators are not used
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
