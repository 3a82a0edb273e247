"""Search for the fastest microbatches, remat policy and mesh that fit a machine, by compiling a few."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxft.distributed.sharding import MeshShape
from jaxft.nn import param_spec
from jaxft.plan.machines import GIB, Machine
from jaxft.plan.plan import Plan, plan, plans
from jaxft.train.settings import Run

# by remat policy: activations saved per layer and token in units of the width, and recomputed FLOPs as a
# fraction of a forward pass
SAVED_WIDTHS = {"none": 34.0, "projections": 17.0, "attention": 4.0, "full": 2, "pairs": 1.5, "offload": 0.5}
RECOMPUTED = {"none": 0.0, "projections": 0.05, "attention": 0.9, "full": 1.0, "pairs": 1.5, "offload": 1.1}


@dataclass(frozen=True)
class Command:
    """A command line whose settings the search varies.

    load(overrides) returns the Run. given: the command line's overrides, such as remat=full. knobs: names of
    the parameters of the recipe's function.
    """

    load: Callable[[list[str]], Run]
    given: list[str]
    knobs: list[str]


@dataclass(frozen=True)
class Choice:
    """One combination of settings: number of microbatches, remat policy and mesh."""

    micro: int
    remat: str
    mesh: MeshShape

    def overrides(self, command: Command) -> list[str]:
        """Return the command line's overrides with the microbatches, remat and mesh of this choice."""
        sizes = {f"mesh.{name}": size for name, size in vars(self.mesh).items()}
        replaced = {"micro", "remat", "data.micro", *sizes}
        others = [text for text in command.given if text.partition("=")[0] not in replaced]
        micro = "micro" if "micro" in command.knobs else "data.micro"
        chosen = {"remat": self.remat, micro: self.micro, **sizes}
        return [*others, *(f"{name}={value}" for name, value in chosen.items())]

    def __str__(self) -> str:
        axes = " ".join(f"{name}={size}" for name, size in vars(self.mesh).items() if size > 1)
        return f"micro={self.micro} remat={self.remat} {axes or 'one device'}"


@dataclass(frozen=True)
class Trial:
    """A planned choice. plan: None if planning raised an error. why: the error's message, else ""."""

    choice: Choice
    plan: Plan | None
    why: str = ""

    def json(self, command: Command) -> dict[str, Any]:
        """Return `overrides` for the command line, `plan` and `why` as plain values."""
        overrides = self.choice.overrides(command)
        return {"overrides": overrides, "plan": self.plan and self.plan.json(), "why": self.why}

    @property
    def seconds(self) -> float:
        """Estimated seconds of a step; infinite if the choice does not fit."""
        if self.plan is None or not self.plan.fits or self.plan.estimate is None:
            return math.inf
        return self.plan.estimate.step


def search(command: Command, machine: Machine, most: int, log: Callable[[str], None]) -> list[Trial]:
    """Plan the most promising choices, and return the trials: fastest first, those that do not fit last.

    Choices are compiled in the order of `rough_estimate`, at most `most` of them. A choice is skipped if the
    rough estimate of its step takes more than 1.3 times as long as the best plan so far. The batch size never
    changes, only its split into microbatches and shards. The run's other programs, such as evaluation, are
    compiled for the fastest trial too; if one does not fit, the trial gets its plan and the next is fastest.
    log(line): called with lines of progress.
    """
    run = command.load(command.given)
    ranked = sorted(candidates(run, machine), key=lambda c: rough_estimate(run, machine, c))
    tried: list[Trial] = []
    for choice in ranked:
        if len(tried) >= most:
            break
        best = min((t.seconds for t in tried), default=math.inf)
        if rough_estimate(run, machine, choice)[1] > 1.3 * best:
            continue
        log(f"{len(tried) + 1} of at most {most}: {choice}")
        try:
            trial = Trial(choice, plan(command.load(choice.overrides(command)), machine))
        except ValueError as error:
            trial = Trial(choice, None, str(error))
        tried.append(trial)
        log("  " + trial_summary(trial))

    def rank(t: Trial) -> tuple[float, float]:
        return t.seconds, t.plan.missing or 0 if t.plan else math.inf

    tried.sort(key=rank)
    while any_fits(tried):  # the run's other programs have to fit too
        try:
            largest = plans(command.load(tried[0].choice.overrides(command)), machine)[0]
            if largest.fits:
                break
            tried[0] = replace(tried[0], plan=largest)
        except ValueError as error:
            tried[0] = Trial(tried[0].choice, None, str(error))
        log(f"  {tried[0].choice}: {trial_summary(tried[0])}")
        tried.sort(key=rank)
    return tried


def candidates(run: Run, machine: Machine) -> Iterator[Choice]:
    """Yield combinations of microbatches, remat policy and mesh that divide the batch and the heads.

    The axis `tensor` is at most 8 and stays within a host; all axes but `data` stay within a TPU slice. The
    axis `data` is 1, the hosts of a slice, or as large as possible.
    """
    batch, config, backward = run.data.batch, run.model.config, run.optim.fused_backward
    hosts, slices = len(set(machine.domains())), _slices(run, machine)
    count = len(machine.devices) // slices
    per_domain = len(machine.devices) // max(hosts, slices)  # devices of a host or slice
    meshes = []
    for tensor, context, data in itertools.product(*([_divisors(count)] * 3)):
        if count % (tensor * context * data) or per_domain % tensor or tensor > 8 or config.kv_heads % tensor:
            continue
        if context > 1 and (run.data.max_length % context or config.heads % (tensor * context)):
            continue
        if data in (1, max(1, hosts // slices), count // (tensor * context)):
            fsdp = count // (tensor * context * data)
            mesh = replace(run.mesh, slices=slices, data=data, fsdp=fsdp, context=context, tensor=tensor)
            meshes.append(mesh)
    odd = any(stack.blocks % 2 for stack in run.model.stacks)
    remats = ("full",) if backward else [remat for remat in SAVED_WIDTHS if remat != "pairs" or not odd]
    for mesh, micro, remat in itertools.product(meshes, _divisors(batch), remats):
        if batch % (micro * _shards(mesh)) == 0 and not (backward and micro > 1):
            yield Choice(micro, remat, mesh)


def _slices(run: Run, machine: Machine) -> int:
    """Return mesh.slices for all candidates: the run's setting if the machine allows it; else the number of
    TPU slices, or on GPUs 1, or the number of hosts for mesh.slices=-1.
    """
    domains, slices, count = len(set(machine.domains())), run.mesh.slices, len(machine.devices)
    least = domains if machine.tpu or slices == -1 else 1
    return slices if slices > 0 and slices % least == 0 and count % slices == 0 else least


def _shards(mesh: MeshShape) -> int:
    """Return the number of shards of a microbatch's rows."""
    return mesh.slices * mesh.data * mesh.fsdp


def rough_estimate(run: Run, machine: Machine, choice: Choice) -> tuple[int, float, int]:
    """Estimate a choice without compiling. Return (excess memory, seconds of a step, bytes per device).

    Excess memory is in quarters of a device's memory, rounded up; 0 if the choice fits. Activations count as
    16-bit floats.
    """
    chip, c, mesh, micro = machine.chip, run.model.config, choice.mesh, choice.micro
    assert chip is not None
    trained, shard = run.adapter is None, mesh.fsdp * mesh.context * mesh.tensor
    data: Any = run.data
    rows, length = replace(data, micro=micro).abstract(_shards(mesh)).ids.shape[1:]
    tokens = rows * length / _shards(mesh) / mesh.context  # of a microbatch, a device
    layers = [spec for spec in param_spec.spec_paths(run.model.specs).values() if "layers" in spec.axes]
    weights = sum(math.prod(spec.shape) for spec in layers if param_spec.kernel(spec)) + 2 * c.vocab * c.width
    weight_bytes = (10 if run.params == "float32" else 5) if trained else 2 if run.quant is None else 0.6
    saved = (SAVED_WIDTHS[choice.remat] * c.layers + 16) * c.width * 2 * tokens / mesh.tensor
    size = int(weights * weight_bytes / shard + saved)
    each = 3 if trained else 2
    flops = run.model.forward_flops(micro * rows * length, length) * (each + RECOMPUTED[choice.remat])
    passes, gathers, reductions = micro * each, 0.0, 0.0
    if mesh.fsdp * mesh.context > 1:
        gathers = passes * _gather_seconds(machine, mesh, 2 * weights / mesh.tensor)
    ways = 2 * (mesh.tensor > 1) + (mesh.context > 1)
    hosts = len(set(machine.domains()))
    rate = chip.within if mesh.context * mesh.tensor * hosts <= len(machine.devices) else chip.across
    activations = passes * 4 * c.layers * c.width * tokens * ways / rate
    if trained and mesh.slices * mesh.data > 1:
        reductions = 4 * weights / shard / (chip.across if hosts > 1 else chip.within)
    seconds = max(flops / (len(machine.devices) * machine.peak * 0.7), gathers) + activations + reductions
    limit = chip.memory - chip.reserved
    return max(0, int(4 * (size - limit) / limit) + 1 if size > limit else 0), seconds, size


def _gather_seconds(machine: Machine, mesh: MeshShape, size: float) -> float:
    """Return the seconds to gather weights of `size` bytes over the mesh axes fsdp and context."""
    chip, hosts = machine.chip, len(set(machine.domains()))
    assert chip is not None
    span = max(1, hosts // (mesh.slices * mesh.data))  # hosts of one replica
    per_host = max(1, mesh.fsdp * mesh.context // span)
    return max(size / chip.within, size * (span - 1) / span / per_host / chip.across)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def trial_summary(t: Trial) -> str:
    """Return a trial's memory, time and MFU as text, or why it does not fit or its error."""
    if t.plan is None:
        return f"error: {t.why}"
    size = f"{t.plan.total / GIB:.2f} GiB" if t.plan.total is not None else "out of memory"
    e = t.plan.estimate
    if not t.plan.fits:
        return f"{size}, {'' if e else f'the program {t.plan.program!r} '}does not fit"
    return f"{size}, {f'{e.step:.3f} s, MFU {100 * e.mfu:.0f} %' if e else 'no time estimate'}"


def any_fits(tried: list[Trial]) -> bool:
    """Whether any of the trials, sorted as `search` returns them, fits."""
    return bool(tried) and tried[0].seconds < math.inf


def search_report(tried: list[Trial], command: Command) -> str:
    """Return the table of trials and the overrides of the fastest one; if none fits, advice in their place.

    tried: as `search` returns them, fastest first.
    """
    lines = [f"{str(t.choice):58s} {trial_summary(t)}" for t in tried]
    if any_fits(tried):
        return "\n".join([*lines, "use: " + " ".join(tried[0].choice.overrides(command))])
    if not tried:
        last = "no mesh and micro divide the batch over the devices; set data.batch to a multiple of them"
    elif all(t.plan is None for t in tried):
        last = f"every choice raises an error; the first: {tried[0].why}"
    else:
        last = "no choice fits; use a smaller data.max_length, quant=nf4, params=bfloat16 or more devices"
    return "\n".join([*lines, last])
