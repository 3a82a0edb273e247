"""Checks of a run's adapters against the model and the other settings, before weights are loaded."""

from collections.abc import Collection, Mapping

from jaxft.nn import param
from jaxft.nn.lora import EVA, pairs_by_path
from jaxft.nn.lora_specs import pair_layouts
from jaxft.nn.quant import CHECKPOINT, QERA
from jaxft.optim.optimizer import Optim, rate_groups
from jaxft.train.partition import Partition, trainable_paths
from jaxft.train.settings import Run
from jaxft.weights.lora_start import check_ranks


def check_adapter(run: Run, parts: Partition) -> None:
    """Raise ValueError for settings of the policy's adapter that don't go together with the others."""
    if run.adapter is None:
        return
    if run.adapter.init != "default" and run.start:
        raise ValueError(
            f"adapter.init={run.adapter.init} is for a fresh adapter, but start={run.start} has its own; set "
            "one of them"
        )
    if run.adapter.dropout and "a" in parts.specs["adapter"].get("head", {}):
        origin = f", which is by default the lora_dropout of the adapter in {run.start}" if run.start else ""
        raise ValueError(
            f"adapter.dropout={run.adapter.dropout} has no effect on an adapter of the head; set "
            f"adapter.dropout=0{origin}"
        )
    if run.adapter.dora:
        _check_dora(run, parts)
    if run.adapter.changes_base:
        _check_init(run, parts)
    if run.adapter.init == EVA:
        specs, names = parts.specs["base"], parts.model.weight_names
        _check_eva(param.spec_paths(specs), pair_layouts(specs, run.adapter, names))


def check_heads(run: Run) -> None:
    """Raise ValueError for heads whose adapters start in a way that only the policy's can."""
    for name, head in run.heads.items():
        if head.adapter and head.adapter.init != "default":
            raise ValueError(
                f"the adapter of {name} has init={head.adapter.init}, which is for the policy's adapter; set "
                "init=default, also where it starts from a folder, because runs export plain LoRA"
            )


def _check_dora(run: Run, parts: Partition) -> None:
    """Raise ValueError for DoRA on weights that are trained themselves."""
    nodes = pairs_by_path(parts.specs["adapter"])
    adapted = {f"base/{path}" for path in nodes}
    if "head" in nodes and "head" not in parts.specs["base"]:
        adapted |= {"base/embed"}
        if "embed" in nodes:
            raise ValueError(
                "adapter.dora on a head that is tied to the embeddings needs a frozen table; leave head out "
                "of adapter.targets, or set adapter.dora=false"
            )
    both = trainable_paths(parts) & adapted
    if both:
        raise ValueError(
            f"{min(both)} is trained and has a DoRA adapter, which needs a frozen weight; set "
            "adapter.dora=false, or leave it out of run.train"
        )


def _check_eva(specs: Mapping[str, param.ParamSpec], layouts: Collection[str]) -> None:
    """Raise ValueError for an EVA adapter of other modules than the blocks' linear layers, or of none.

    specs: of the base. layouts: paths of the adapted modules.
    """
    others = [path for path in layouts if path not in specs or param.lead_axes(specs[path]) != ("layers",)]
    if others or not layouts:
        named = f"leave {', '.join(others)} out of adapter.targets" if others else "name adapter.targets"
        raise ValueError(f"adapter.init={EVA} starts from the inputs of the blocks' linear layers; {named}")


def _check_init(run: Run, parts: Partition) -> None:
    """Raise ValueError for settings that an adapter which changes the base can't be combined with."""
    assert run.adapter is not None
    setting = f"adapter.init={run.adapter.init}"
    if run.quant and run.quant.kind == CHECKPOINT:
        raise ValueError(
            f"{setting} changes the base, which quant={CHECKPOINT} stores unchanged; use another quant"
        )
    if run.adapter.init == "loftq" and not run.quant:
        raise ValueError(f"{setting} compensates for quantisation; set quant=nf4, or use adapter.init=pissa")
    calibrated = run.quant is not None and run.quant.calibrate is not None
    if calibrated and run.adapter.init != QERA:
        raise ValueError(f"{setting} changes the base before quant.calibrate; use adapter.init=qera")
    if run.adapter.init == QERA and not calibrated:
        raise ValueError(f"{setting} corrects a calibrated base; set quant=nf4 quant.calibrate=run")
    check_ranks(parts.specs["base"], run.adapter, parts.model.weight_names)


def check_lora_plus(run: Run, specs: param.Specs) -> None:
    """Raise ValueError for optim.lora_plus in a run that trains no LoRA matrix b."""
    ratio = run.optim.lora_plus
    if ratio is not None and not rate_groups(Optim(lora_plus=ratio), specs):
        raise ValueError(
            f"optim.lora_plus={ratio} applies to LoRA matrices b, and this run trains none; set "
            "optim.lora_plus=none"
        )
