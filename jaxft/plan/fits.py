"""Which models and methods fit which hardware, from the programs that scripts/bench/fits.py has compiled.

Nothing here needs jax, so that `jaxft plan` prints the table without an extra.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "fits.json"
MODELS = {
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
    "8B": "meta-llama/Llama-3.1-8B-Instruct",
    "70B": "meta-llama/Llama-3.3-70B-Instruct",
    "405B": "meta-llama/Llama-3.1-405B-Instruct",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "Qwen3-32B": "Qwen/Qwen3-32B",
    "Gemma-3-27B": "google/gemma-3-27b-it",
}
TRAINING = ("full", "LoRA", "QLoRA")
OBJECTIVES = ("sft", "dpo")
GPUS = ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8")
HARDWARE = {
    "rtx4090": ("RTX 4090 24 GB", GPUS[:4]),
    "a100-40": ("A100 40 GB", GPUS),
    "h100": ("H100 80 GB", GPUS),
    "v5e": ("TPU v5e 16 GB", ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v6e": ("TPU v6e 32 GB", ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": ("TPU v5p 95 GB", ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")),
}
TABLE_NOTES = """\
GiB per device x the smallest number of devices that fits it (no factor: one device; v5p comes in slices of
four chips; – is more than the largest number tried). One row of 2048 tokens per device, remat=full; full is
Adafactor with bfloat16 weights and fused_backward=true. Read RTX 4090 for other GPUs of 24 GB (RTX 3090, L4
and A10G have 1 to 2 GB less), A100 40 GB for an L40S, H100 for an A100 of 80 GB, an H200, B200 or MI300X.

jaxft plan sft --devices 24gb data=rows.jsonl --price 0.5 plans a run of yours: memory, time, hours and money.
It compiles the run, for NVIDIA and AMD GPUs with jax's CUDA plugin (pip install 'jaxft[cuda12]'), for TPUs
with libtpu (pip install 'jaxft[tpu]'); no GPU or TPU is needed."""

Cells = Mapping[str, dict[str, Any]]


def stored_cells() -> dict[str, Any]:
    """Return the compiled programs that come with jaxft, by "chip:size model method objective"."""
    cells: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return cells


def smallest(cells: Cells, chip: str, model: str, method: str, objective: str) -> dict[str, Any] | None:
    """Return the smallest size that fits; {} if none does, None if a size is not yet compiled."""
    for size in HARDWARE[chip][1]:
        cell = cells.get(f"{chip}:{size} {model} {method} {objective}")
        if cell is None:
            return None
        if cell["fits"]:
            return {**cell, "name": size}
    return {}


def cell_text(one: Mapping[str, Any] | None) -> str:
    """Return the text of a cell: GiB per device, and the number of devices if more than one."""
    if one is None:
        return ""
    if not one:
        return "–"
    size = f"{one['total'] / 2**30:.1f}"
    return size if one["devices"] == 1 else f"{size} × {one['devices']}"


def rows_of_fits(
    cells: Cells,
    hardware: Sequence[str],
    models: Sequence[str],
    methods: Sequence[str],
    objectives: Sequence[str],
) -> list[list[str]]:
    """Return the rows of a table: a model, a method, an objective and a cell per chip. Rows without any cell
    are left out.
    """
    rows = []
    for model in models:
        for method in methods:
            for objective in objectives:
                row = []
                for chip in hardware:
                    best = smallest(cells, chip, model, method, objective)
                    first = smallest(cells, chip, model, method, "sft") if objective == "dpo" else best
                    if best and first:  # SFT and DPO both have to fit
                        best = max(best, first, key=lambda one: (one["devices"], one["total"]))
                    row.append(cell_text(best))
                if any(row):
                    name = MODELS[model].partition("/")[2].removesuffix("-Instruct")
                    rows.append([name, method, "SFT" if objective == "sft" else "SFT + DPO", *row])
    return rows


def fits_report() -> str:
    """Return the table of all models and hardware as text for a terminal, with its notes."""
    names = [name for name, _ in HARDWARE.values()]
    rows = [
        ["", "", "", *names],
        *rows_of_fits(stored_cells(), list(HARDWARE), list(MODELS), TRAINING, OBJECTIVES),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(["What fits where:", "", *lines, "", TABLE_NOTES])
