"""The fastest settings of a run that fit a machine, found by compiling a few: microbatches, remat policy, mesh shape."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxft.distributed import devices
from jaxft.distributed.sharding import MeshShape
from jaxft.nn import param
from jaxft.plan.machines import Machine
from jaxft.plan.plan import GIB, Plan, plan, plans
from jaxft.train.settings import Run

KEEPS = {"none": 34.0, "projections": 17.0, "attention": 4.0, "full": 2.0, "pairs": 1.5, "offload": 0.5}
RERUNS = {"none": 0.0, "projections": 0.05, "attention": 0.9, "full": 1.0, "pairs": 1.5, "offload": 1.1}


@dataclass(frozen=True)
class Command:
    """A command line: load(overrides) -> Run, the overrides on it, and the names of the config's knobs."""

    load: Callable[[list[str]], Run]
    given: list[str]
    knobs: list[str]


@dataclass(frozen=True)
class Choice:
    """Settings that are tried."""

    micro: int
    remat: str
    mesh: MeshShape

    def overrides(self, command: Command) -> list[str]:
        """What the command line said, with these in the place of its own."""
        mine = {"micro", "remat", "data.micro"} | {f"mesh.{f.name}" for f in fields(MeshShape)}
        kept = [text for text in command.given if text.partition("=")[0] not in mine]
        sizes = {f.name: getattr(self.mesh, f.name) for f in fields(MeshShape)}
        micro = "micro" if "micro" in command.knobs else "data.micro"
        return [
            *kept,
            f"remat={self.remat}",
            f"{micro}={self.micro}",
            *(f"mesh.{name}={n}" for name, n in sizes.items()),
        ]

    def __str__(self) -> str:
        cuts = " ".join(f"{f.name}={n}" for f in fields(MeshShape) if (n := getattr(self.mesh, f.name)) > 1)
        return f"micro={self.micro} remat={self.remat} {cuts or 'one device'}"


@dataclass(frozen=True)
class Tried:
    """A choice with its plan, or why there is none."""

    choice: Choice
    plan: Plan | None
    why: str = ""

    def json(self, command: Command) -> dict[str, Any]:
        """The settings as they stand on the command line, and the plan."""
        return {
            "overrides": self.choice.overrides(command),
            "plan": self.plan and self.plan.json(),
            "why": self.why,
        }

    @property
    def seconds(self) -> float:
        """Of a step where it fits, else without end."""
        return (
            self.plan.estimate.step if self.plan and self.plan.fits and self.plan.estimate else float("inf")
        )


def search(command: Command, machine: Machine, most: int, say: Callable[[str], None]) -> list[Tried]:
    """Plans of the most promising choices, the fastest that fits first; those that don't fit come last.

    What an estimate by arithmetic finds too large or slow is not compiled; `most` bounds what is. Each
    batch stays what the run says: only how it is cut changes. Ends early when nothing left could be faster by the arithmetic.
    """
    run = command.load(command.given)
    ranked = sorted(candidates(run, machine), key=lambda c: guess(run, machine, c))
    tried: list[Tried] = []
    for choice in ranked:
        if len(tried) >= most:
            break
        best = min((t.seconds for t in tried), default=float("inf"))
        if guess(run, machine, choice)[1] > 1.3 * best:  # its products alone take longer
            continue
        say(f"{len(tried) + 1} of at most {most}: {choice}")
        try:
            one = Tried(choice, plan(command.load(choice.overrides(command)), machine))
        except ValueError as error:
            one = Tried(choice, None, str(error))
        tried.append(one)
        say("  " + choice_summary(one))
    order = lambda: tried.sort(key=lambda t: (t.seconds, _missing(t)))  # noqa: E731
    order()
    while found(tried):  # what it recommends holds the run's other programs too
        try:
            whole = plans(command.load(tried[0].choice.overrides(command)), machine)[0]
            if whole.fits:
                break
            tried[0] = replace(tried[0], plan=whole)
        except ValueError as error:
            tried[0] = Tried(tried[0].choice, None, str(error))
        say(f"  {tried[0].choice}: {choice_summary(tried[0])}")
        order()
    return tried


def candidates(run: Run, machine: Machine) -> Iterator[Choice]:
    """Every microbatch count, remat policy and mesh that the batch, the heads and the layers allow.

    A mesh keeps tensor within a host and all but data within a TPU's slice; it cuts time where all heads can be swapped for it.
    """
    batch, config, backward = run.data.batch, run.model.config, run.optim.fused_backward
    hosts, slices = len(set(machine.places())), _slices(run, machine)
    count = len(machine.devices) // slices
    together = len(machine.devices) // max(hosts, slices)  # devices of a host, or of a slice
    meshes = []
    for tensor, context, data in itertools.product(*([_divisors(count)] * 3)):
        if count % (tensor * context * data) or together % tensor or tensor > 8 or config.kv_heads % tensor:
            continue
        if context > 1 and (run.data.max_length % context or config.heads % (tensor * context)):
            continue
        if data in (1, max(1, hosts // slices), count // (tensor * context)):
            sizes = {
                "data": data,
                "tensor": tensor,
                "context": context,
                "fsdp": count // (tensor * context * data),
            }
            meshes.append(replace(run.mesh, slices=slices, **sizes))
    remats = ("full",) if backward else [r for r in KEEPS if r != "pairs" or config.layers % 2 == 0]
    for mesh, micro, remat in itertools.product(meshes, _divisors(batch), remats):
        if batch % (micro * _shards(mesh)) == 0 and not (backward and micro > 1):
            yield Choice(micro, remat, mesh)


def _slices(run: Run, machine: Machine) -> int:
    """mesh.slices of every candidate: a TPU's slices, or a multiple of them that the run wants; for hosts what the run says."""
    groups, wanted, count = len(set(machine.places())), run.mesh.slices, len(machine.devices)
    least = groups if machine.tpu or wanted == -1 else 1
    return wanted if wanted > 0 and wanted % least == 0 and count % wanted == 0 else least


def _shards(mesh: MeshShape) -> int:
    """Parts of a microbatch's rows."""
    return mesh.slices * mesh.data * mesh.fsdp


def guess(run: Run, machine: Machine, choice: Choice) -> tuple[int, float, int]:
    """(how far it is from fitting in memory's quarters, seconds of a step, bytes a device) by arithmetic alone.

    Activations a layer and token are KEEPS widths of the compute dtype for each policy; products run again by RERUNS.
    """
    chip, c, mesh, micro = machine.chip, run.model.config, choice.mesh, choice.micro
    assert chip is not None
    trained, shard = run.adapter is None, mesh.fsdp * mesh.context * mesh.tensor
    data: Any = run.data
    rows, length = replace(data, micro=micro).abstract(_shards(mesh)).ids.shape[1:]
    tokens = rows * length / _shards(mesh) / mesh.context  # of a microbatch, a device
    layers = param.spec_paths(run.model.specs["layers"]).values()
    weights = sum(math.prod(spec.shape) for spec in layers if len(spec.axes) == 3) + 2 * c.vocab * c.width
    bytes_each = (10 if run.params == "float32" else 5) if trained else 2 if run.quant is None else 0.6
    size = int(
        weights * bytes_each / shard
        + (KEEPS[choice.remat] * c.layers + 16) * c.width * 2 * tokens / mesh.tensor
    )
    flops = run.model.forward_flops(micro * rows * length, length) * (
        (3 if trained else 2) + RERUNS[choice.remat]
    )
    passes = micro * (3 if trained else 2)
    gathers = (
        passes * _sent(machine, mesh, 2 * weights / mesh.tensor) if mesh.fsdp * mesh.context > 1 else 0.0
    )
    ways = 2 * (mesh.tensor > 1) + (mesh.context > 1)
    hosts = len(set(machine.places()))
    rate = chip.within if mesh.context * mesh.tensor * hosts <= len(machine.devices) else chip.across
    exchanges = passes * 4 * c.layers * c.width * tokens * ways / rate
    copies = mesh.slices * mesh.data
    shared = (
        trained * 4 * weights / shard / (chip.across if len(set(machine.places())) > 1 else chip.within)
        if copies > 1
        else 0
    )
    seconds = (
        max(flops / (len(machine.devices) * devices.peak_flops(machine.devices[0]) * 0.7), gathers)
        + exchanges
        + shared
    )
    limit = chip.memory - chip.kept
    return max(0, int(4 * (size - limit) / limit) + 1 if size > limit else 0), seconds, size


def _sent(machine: Machine, mesh: MeshShape, size: float) -> float:
    """Seconds to gather `size` bytes along fsdp and context: those that copies within a host or slice have at hand, or across."""
    chip, hosts = machine.chip, len(set(machine.places()))
    assert chip is not None
    span = max(1, hosts // (mesh.slices * mesh.data))  # hosts that hold parts of one copy
    own = max(1, mesh.fsdp * mesh.context // span)
    return max(size / chip.within, size * (span - 1) / span / own / chip.across)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _missing(t: Tried) -> float:
    return float(t.plan.missing or 0) if t.plan else float("inf")


def choice_summary(t: Tried) -> str:
    """One line about a choice that was tried."""
    if t.plan is None:
        return f"refused: {t.why}"
    size = f"{t.plan.total / GIB:.2f} GiB" if t.plan.total is not None else "more than there is"
    time: Any = (
        f"{t.plan.estimate.step:.3f} s, MFU {100 * t.plan.estimate.mfu:.0f} %"
        if t.plan.estimate
        else "no time"
    )
    fails = "does not fit" if t.plan.estimate else f"its {t.plan.program} does not fit"
    return f"{size}, {time}" if t.plan.fits else f"{size}, {fails}"


def found(tried: list[Tried]) -> bool:
    """Whether something fits."""
    return bool(tried) and tried[0].seconds < float("inf")


def search_report(tried: list[Tried], command: Command) -> str:
    """The table, the fastest first, and the recommendation as the words to put on the command line."""
    lines = [f"{str(t.choice):58s} {choice_summary(t)}" for t in tried]
    if found(tried):
        return "\n".join([*lines, "use: " + " ".join(tried[0].choice.overrides(command))])
    if not tried:
        last = "no mesh and microbatches divide this batch over the devices; use a data.batch that is a multiple of them"
    elif all(t.plan is None for t in tried):
        last = f"every choice that was tried is refused, the first with: {tried[0].why}"
    else:
        last = "nothing that was tried fits; use a smaller data.max_length, quant=, params=bfloat16 or more devices"
    return "\n".join([*lines, last])
