"""What a run takes on a machine that is not here: its train step is compiled for it, without weights, rows or network.

    python scripts/plan.py --config configs/llama31_8b_sft.py --devices h100:1 quant=nf4 batch=1 micro=1 remat=full

--devices: h100:1 is one GPU, h100:8 one host with eight, h100:2x8 two such hosts. Compiling for NVIDIA GPUs takes jax's CUDA
plugin (pip install 'jaxft[cuda12]'), but no GPU.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a Python file with a function config(...) -> Run")
    parser.add_argument("--devices", required=True, help="the machine, such as h100:1")
    parser.add_argument("--json", action="store_true", help="one JSON line, in bytes")
    parser.add_argument("overrides", nargs="*", help="knob=value or section.field=value")
    return parser.parse_intermixed_args()


def main() -> int:
    """Compile and print."""
    args = arguments()
    os.environ["JAX_PLATFORMS"] = "cpu"  # the machine here has no part in it
    from jaxft import config, plan

    found, arrays = plan.plan(config.load(args.config, args.overrides), plan.devices(args.devices))
    print(json.dumps({**found, "largest": arrays}) if args.json else plan.words(found, arrays))
    return 0


if __name__ == "__main__":
    from jaxft import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
