"""The runs of a sweep: together in one program where they can be, or else one after the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.distributed import processes
from jaxft.runs import folder as runfolder
from jaxft.runs.trackers.jsonl import METRICS
from jaxft.train import loop
from jaxft.train.logs.clock import Clock
from jaxft.train.settings import Run
from jaxft.train.sweep.sweep import Sweep, check_members, reason_to_separate, with_one_split, write_table

SIGNAL = 128  # exit codes from here on are of a run that a signal stopped


def train_sweep(
    name: str,
    runs: Mapping[str, Run],
    at_once: int | None = None,
    root: Path = Path("runs"),
    clock: Clock | None = None,
) -> int:
    """Train the runs of a sweep, or resume them; return the exit code, see loop.run. All hold out the same
    rows.

    runs: by label, which is also the name of the run's folder in the sweep's. at_once: see Sweep; None
    for runs that may also be trained one after the other, if they cannot share a program. clock: see
    loop.run; runs that are trained one after the other have clocks of their own.
    """
    runs = with_one_split(runs)
    reason = reason_to_separate(runs) if at_once is None else ""
    if not reason:
        return loop.run(Sweep(name, runs, 1 if at_once is None else at_once), root=root, clock=clock)
    print(f"{len(runs)} runs, one after the other: {reason}", flush=True)
    return _train_each(name, runs, root)


def _train_each(name: str, runs: Mapping[str, Run], root: Path) -> int:
    """Train one run after the other, then write the sweep's table. One that ends with steps or a loss that
    are not finite is left out; the others continue.
    """
    folder, failed = runfolder.folder_of(root, name), []
    record: dict[str, Any] = {"members": list(runs), "at_once": None}
    check_members(folder, record["members"])
    folder.mkdir(parents=True, exist_ok=True)
    runfolder.write_durable_json(folder / "config.json", record)
    for label, run in runs.items():
        print(f"\n{label}:", flush=True)
        try:
            code = loop.run(run, root=root)
        except processes.AgreedError as error:
            if not (folder / label / METRICS).is_file():  # its settings are at fault
                raise
            print(error, flush=True)
            failed.append(label)
            continue
        if code >= SIGNAL:
            return code
    ends = {
        label: runfolder.read_saved_json(folder / label / runfolder.SUMMARY)
        for label in runs
        if label not in failed
    }
    if not ends:
        raise ValueError(
            f"{folder}: none of its runs is finished; correct the errors above and start the same command "
            "again"
        )
    before, after = (
        {label: end[side]["metrics"] for label, end in ends.items()} for side in ("before", "after")
    )
    steps = max(end["steps"] for end in ends.values())
    print(f"\n{write_table(folder, name, steps, (before, after), failed)}")
    print(f"the table is in {folder / runfolder.CARD}, the curves in {folder / 'curves.png'}")
    return int(bool(failed))
