"""What a run takes on a machine that is not here: its programs are compiled for it, without weights, rows or network.

    python scripts/plan.py --config configs/llama31_8b_sft.py --devices h100:1 quant=nf4 batch=1 micro=1 remat=full
    python scripts/plan.py --config configs/llama31_8b_sft.py --devices v5p:4x4x4 full=true batch=64 micro=1 --json
    python scripts/plan.py --config configs/llama31_8b_sft.py --devices h100:8 --search full=true batch=32
    python scripts/plan.py --config configs/llama31_8b_sft.py --devices v5p:2x2x2 v5p:4x4x4 v5p:8x8x8 full=true \
        batch={devices} micro=1

All of a run's programs are compiled: its step, and what runs before, after and between (evaluation, answers, ...); with
--train-only, where several machines are compared and in a --search only what trains.

--devices: h100:1 is one GPU, h100:8 a host with eight, h100:2x8 two such hosts, v5e:4x4 a slice, 2xv5e:4x4 two slices; of h100,
h200, a100-40, a100-80, rtx4090, v5e, v5p and v6e. Several are planned one after the other and compared; {devices} in an
override is how many there are. A --search in which nothing fits ends with 1. Compiling for NVIDIA GPUs takes jax's CUDA plugin
(pip install 'jaxft[cuda12]'), for TPUs libtpu (pip install 'jaxft[tpu]'), but neither takes the device. --quick asks a TPU's
compiler for little optimisation: a tenth of the time; on several chips up to a sixth fewer bytes than without, unless the run has
JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 in its environment.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a Python file with a function config(...) -> Run")
    parser.add_argument(
        "--devices", required=True, nargs="+", help="the machine, such as h100:1; several are compared"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line a plan, in bytes and seconds")
    parser.add_argument("--train-only", action="store_true", help="compile only what trains")
    parser.add_argument("--quick", action="store_true", help="for TPUs: compile in a tenth of the time")
    parser.add_argument(
        "--search", action="store_true", help="try microbatches, remat policies and meshes, recommend one"
    )
    parser.add_argument("--most", type=int, default=12, help="programs that a search compiles at most")
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value")
    return parser.parse_intermixed_args()


def main() -> int:
    """Compile and print."""
    args = arguments()
    os.environ["JAX_PLATFORMS"] = "cpu"  # the machine here has no part in it
    from jaxft.plan import machines, plan, programs, search
    from jaxft.plan import text as plan_text
    from jaxft.runs import config

    plan.set_quick(args.quick)
    names = [name for name in args.devices if "=" not in name]  # what follows the devices may be overrides
    overrides = [*(name for name in args.devices if "=" in name), *args.overrides]
    if not names:
        raise ValueError(
            f"--devices names no machine; found {' '.join(args.devices)}, wanted one such as h100:8 before it"
        )
    found: list[plan.Plan] = []
    code = 0
    for name in names:
        machine = machines.machine(name)
        given = [text.replace("{devices}", str(len(machine.devices))) for text in overrides]
        if args.search:
            load = lambda texts: config.load_config(args.config, texts)  # noqa: E731
            command = search.Command(load, given, config.knob_names(args.config))
            say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
            tried = search.search(command, machine, args.most, say)
            print(
                json.dumps([t.json(command) for t in tried])
                if args.json
                else search.search_report(tried, command),
                flush=True,
            )
            code = code if search.found(tried) else 1
            continue
        wanted = programs.steps if args.train_only or len(names) > 1 else programs.every
        each = plan.plans(config.load_config(args.config, given), machine, wanted)
        found.append(next(one for one in each if one.flops is not None))  # the largest of what trains
        print(
            json.dumps(plan_text.record(found[-1], each)) if args.json else plan_text.plan_report(found[-1]),
            flush=True,
        )
        if len(each) > 1 and not args.json:
            print(plan_text.programs_report(each), flush=True)
    if len(found) > 1 and not args.json:
        print(plan_text.scaling(found))
    return code


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
