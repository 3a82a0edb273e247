"""Compile to find which models and methods fit which hardware; print a Markdown table and write JSON.

    python scripts/bench/fits.py --out fits.json                # all cells, one or two hours of one CPU core
    python scripts/bench/fits.py --out fits.json --hardware h100 rtx4090 --models 8B
    python scripts/bench/fits.py --out fits.json --print        # print a finished file

A cell is the memory per device of training on the smallest number of devices that fit it, with one row of
2048 tokens per device and the settings that need least memory (SETTINGS; on TPUs also
JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1). Every method is tried on all hardware, except for models in ONLY. The
same command continues a stopped one; --again also recompiles cells of an older jax or older code. Several
processes can run at once with different --out; --out ALL --add A B merges their files. Needs the cuda12 and
tpu extras, and no device.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ["JAX_PLATFORMS"] = "cpu"  # local accelerators are not used; jax reads it when it is imported

from jaxft.plan.machines import HARDWARE, MODELS, OBJECTIVES, TRAINING, rows_of_fits  # noqa: E402

LENGTH = 2048  # tokens per device: one row, or a pair with two responses and a prompt of half of it each
ONLY = {"405B": ("LoRA", "sft", "v5p")}  # (method, objective, chip) of models that are not tried with all
SETTINGS = {
    ("full", "sft"): [
        "full=true", "params=bfloat16", "fused_backward=true", "optimizer=adafactor",
        "remat=full",
    ],
    ("full", "dpo"): [
        "adapter=none", "params=bfloat16", "optim.fused_backward=true", "optim.clip=none",
        "optim.optimizer=adafactor", "reference=precomputed", "remat=full",
    ],
    ("LoRA", "sft"): ["remat=full"],
    ("LoRA", "dpo"): ["remat=full"],
    ("QLoRA", "sft"): ["quant=nf4", "remat=full"],
    ("QLoRA", "dpo"): ["quant=nf4", "remat=full"],
}  # fmt: skip
# Folders and files of jaxft that do not affect a run's programs.
PLANNER = ("plan", "cli/cli.py", "runs/run_texts.py", "runs/log.py", "runs/trackers.py", "runs/console.py")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("fits.json"))
    parser.add_argument("--hardware", nargs="+", choices=HARDWARE, default=list(HARDWARE), metavar="CHIP")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="SIZE")
    parser.add_argument("--methods", nargs="+", choices=TRAINING, default=list(TRAINING))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--again", action="store_true", help="recompile cells of an older jax or older code")
    parser.add_argument(
        "--add",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="merge the cells of FILEs without compiling",
    )
    parser.add_argument("--print", action="store_true", help="print the table without compiling")
    return parser.parse_args(argv)


def cells_of(a: argparse.Namespace) -> Iterator[tuple[str, str, str, str]]:
    """Yield (chip, model, method, objective) of each cell, without the cells that ONLY excludes.

    They are ordered by objective, model, method and chip, each in the order of its option.
    """
    for objective, model, method, chip in itertools.product(a.objectives, a.models, a.methods, a.hardware):
        if ONLY.get(model, (method, objective, chip)) == (method, objective, chip):
            yield chip, model, method, objective


def settings(model: str, method: str, objective: str, devices: int) -> tuple[str, list[str]]:
    """Return the recipe and the settings of a cell of the table: a model, method and objective on some
    devices.
    """
    rows = [f"batch={devices}", "micro=1", f"max_length={LENGTH if objective == 'sft' else LENGTH // 2}"]
    return f"configs/llama31_8b_{objective}.py", [
        f"model={MODELS[model]}",
        *SETTINGS[method, objective],
        *rows,
    ]


def source_hash() -> str:
    """Hash jax's version and the code of a run's programs, without the planner."""
    import jax

    digest = hashlib.sha256(jax.__version__.encode())
    root = Path(sys.path[0])
    for path in sorted([*(root / "jaxft").rglob("*.py"), *(root / "configs").glob("llama31_8b_*.py")]):
        if not any(path.is_relative_to(root / "jaxft" / part) for part in PLANNER):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def planned(run: Any, machine: Any) -> dict[str, Any]:
    """Return the stored fields of a plan, or its error. Nothing is compiled if resident arrays do not fit."""
    from jaxft.plan import machines, plan, program_bytes
    from jaxft.train import programs

    none = {"fits": False, "total": None, "devices": len(machine.devices)}
    try:
        resident = sum(program_bytes.resident(programs.abstract(run, machine.devices)[0]).values())
        if resident + 0.4 * machines.GIB > machine.chip.memory - machine.chip.reserved:
            return {**none, "resident": resident}
        cell = plan.plan(run, machine).json()
    except ValueError as error:
        return {**none, "why": str(error)}
    return {
        name: cell[name]
        for name in ("fits", "total", "missing", "devices", "parts", "compile_seconds", "why")
    }


def cell(chip: str, model: str, method: str, objective: str, known: dict[str, Any], save: Any) -> None:
    """Plan a cell for more and more devices until they fit. known: the finished cells, to which the result is
    added; save() writes them.
    """
    from jaxft.plan import machines
    from jaxft.runs.settings import config

    for size in HARDWARE[chip][1]:
        name = f"{chip}:{size}"
        key = f"{name} {model} {method} {objective}"
        entry = known.get(key)
        if entry is None:
            machine = machines.machine(name)
            path, overrides = settings(model, method, objective, len(machine.devices))
            run, begin = config.load_config(str(Path(sys.path[0]) / path), overrides), time.perf_counter()
            entry = planned(run, machine)
            entry |= {
                "config": path,
                "overrides": overrides,
                "seconds": round(time.perf_counter() - begin, 1),
            }
            save(key, entry)
            size_ = f"{entry['total'] / machines.GIB:.2f} GiB" if entry["total"] else "too large"
            print(
                f"{key}: {size_}, fits: {entry['fits']} ({entry['seconds']} s)", file=sys.stderr, flush=True
            )
        if entry["fits"]:
            return


def table(cells: dict[str, Any], a: argparse.Namespace) -> str:
    """Return Markdown with a row per model, method and objective, and a column per chip. cells: entries of
    the file --out by "CHIP:SIZE MODEL METHOD OBJECTIVE".
    """
    lines = [
        "| | | | " + " | ".join(HARDWARE[chip][0] for chip in a.hardware) + " |",
        "|---" * (3 + len(a.hardware)) + "|",
    ]
    rows = rows_of_fits(cells, a.hardware, a.models, a.methods, a.objectives)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write(path: Path, cells: dict[str, Any]) -> None:
    """Write all cells, replacing the file atomically."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(cells, indent=1))
    temporary.replace(path)


def main() -> int:
    """Compile the missing cells, and print the table."""
    a = arguments()
    version = source_hash()

    def stored() -> dict[str, Any]:
        return json.loads(a.out.read_text()) if a.out.exists() else {}

    def known() -> dict[str, Any]:
        return {key: cell for key, cell in stored().items() if cell["source"] == version or not a.again}

    def save(key: str, entry: dict[str, Any]) -> None:
        write(a.out, {**stored(), key: {**entry, "source": version}})

    for other in a.add:
        write(a.out, stored() | json.loads(other.read_text()))
    if not (a.print or a.add):
        from jaxft.plan import plan

        plan.set_quick(True)  # needs least memory on TPUs; no effect on GPUs
        for chip, model, method, objective in cells_of(a):
            cell(chip, model, method, objective, known(), save)
    print(table(stored(), a))
    older = sum(cell["source"] != version for cell in stored().values())
    if older:
        print(
            f"\n{older} of {len(stored())} programs were compiled with an older jax or older code; "
            "use --again to recompile them"
        )
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
