"""Measure training and generation of models with random weights on an accelerator, as one JSON line per case.

    python scripts/bench/bench.py gpu                       # all cases
    python scripts/bench/bench.py gpu --cases "8b lora" "8b qlora"
    python scripts/bench/bench.py gpu --tiny                # the same programs in small shapes, for a CPU

Every case runs in a separate process. Rows are random text of a byte-level tokenizer, packed to 4096 tokens
("16k": to 16,384). `mfu` counts 4 FLOPs per token and weight (without the embedding table) for adapters, and
6 for full training. `peak_gib` is measured by the device, `compiled_gib` planned by the compiler for the
train step. `kernels` are the three slowest kernels of a profiled step. Generation completes each of
32 prompts 8 times at temperature 1, 64 completions at a time; they have about 63 tokens on average, at most
256. Pairs named after a data set have lengths like its rows (see PROFILES); the prompt is stored once for
both responses or (`plain`) before each, and pairs_per_second compares the two.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[2])

WARM, TIMED = 2, 6  # steps
EIGHT, ONE = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"
FOUR = "Qwen/Qwen3-4B"


# Mean tokens of a prompt and of a response, with about 4 bytes per token. UltraFeedback: 185 and 305
# (statistics in arXiv 2310.01377), or 6,411 bytes per row of 4 prompts and 3 responses (card of
# HuggingFaceH4/ultrafeedback_binarized). MetaMath with worked examples in the prompt: 3,074 bytes per row of
# a prompt and 2 responses (card of abacusai/MetaMath_DPO_FewShot); the responses' part is an estimate.
PROFILES = {"ultrafeedback": (185, 305), "metamath": (450, 160)}


@dataclass(frozen=True)
class Case:
    """One measurement. trains: "adapter" or "all". quant: format of the base. rows: packed rows per step;
    with a profile, pairs per step; for generation, completions at a time. profile: a key of PROFILES, or ""
    for random lengths. layout: "plain" stores a pair's prompt before each response. length: tokens of a row.
    """

    preset: str
    trains: str = "adapter"
    quant: str = "none"
    objective: str = "sft"
    rows: int = 4
    remat: Any = "attention"
    profile: str = ""
    layout: str = "auto"
    length: int = 4096

    def row_length(self, tiny: bool) -> int:
        """Return the tokens of a row, fewer for --tiny."""
        return self.length // 32 if tiny else self.length


def pairs_like(profile: str, layout: str) -> Case:
    """Return the Case of DPO of an 8B model with LoRA, on pairs with the lengths of a profile."""
    return Case(EIGHT, objective="dpo", rows=16, profile=profile, layout=layout)


CASES = {
    "8b lora": Case(EIGHT),
    "8b qlora": Case(EIGHT, quant="nf4"),
    "8b fp8 lora": Case(EIGHT, quant="fp8"),
    "8b qlora dpo": Case(EIGHT, quant="nf4", objective="dpo"),
    "8b dpo ultrafeedback": pairs_like("ultrafeedback", "branches"),
    "8b dpo ultrafeedback plain": pairs_like("ultrafeedback", "plain"),
    "8b dpo metamath": pairs_like("metamath", "branches"),
    "8b dpo metamath plain": pairs_like("metamath", "plain"),
    "4b lora 16k": Case(FOUR, rows=1, length=16384),
    "8b generate": Case(EIGHT, objective="generate", rows=64),
    "1b lora": Case(ONE, rows=8),
    "1b qlora": Case(ONE, quant="nf4", rows=8),
    "1b full": Case(ONE, trains="all", rows=8),
    "1b dpo": Case(ONE, objective="dpo", rows=8),
    "1b generate": Case(ONE, objective="generate", rows=64),
}


def arguments() -> argparse.Namespace:
    """Parse the command line after `gpu`."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.py gpu", description=__doc__, formatter_class=shape)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="CASE",
        help=f"any of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="two layers of width 64 and rows of a thirty-second of the length"
    )
    parser.add_argument("--here", action="store_true", help="run in this process, for one case")
    return parser.parse_args()


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token per byte, <s> and </s>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def texts(count: int, length: int) -> list[dict[str, str]]:
    """Return rows for sft and dpo with about `length` characters in prompt and responses."""
    rng, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyz "))

    def text(fraction: float) -> str:
        return "".join(rng.choice(letters, max(1, int(fraction * length))))

    rows = [{"prompt": text(0.5), "chosen": text(0.25), "rejected": text(0.25)} for _ in range(count)]
    return [{**row, "completion": row["chosen"] + row["rejected"]} for row in rows]


def pairs_of(profile: str, count: int, longest: int) -> list[dict[str, str]]:
    """Return random pairs whose lengths have the profile's means and are log-normal with a sigma of 0.6.
    longest: the most tokens of a prompt with a response.
    """
    rng, means = np.random.default_rng(0), PROFILES[profile]

    def text(mean: int) -> str:
        size = mean * float(rng.lognormal(-0.18, 0.6))
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), max(1, min(int(size), longest // 2))))

    return [
        {"prompt": text(means[0]), "chosen": text(means[1]), "rejected": text(means[1])} for _ in range(count)
    ]


def make_run(case: Case, tiny: bool, data: Path) -> Any:
    """Return the Run of a case."""
    import jax.numpy as jnp

    from jaxft.data.pairs import PairRows
    from jaxft.data.sft import Rows
    from jaxft.models import model_types
    from jaxft.nn.adapters.lora import Adapter
    from jaxft.nn.quant import Quant
    from jaxft.objectives.losses.preference_losses import dpo
    from jaxft.objectives.preference import preference
    from jaxft.objectives.sft import sft
    from jaxft.optim import optimizer
    from jaxft.train.settings import Run

    family = next(family for family in model_types.FAMILIES.values() if case.preset in family.presets)
    config: Any = family.presets[case.preset]
    length = case.row_length(tiny)
    if tiny:
        sizes: dict[str, Any] = dict(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, mlp=128, vocab=320)
        config = replace(config, **sizes)
    rows: dict[str, Any] = {"held_out": None, "batch": case.rows}
    if case.objective == "dpo":
        pairs = PairRows(str(data), format="plain", max_length=length // 2, layout=case.layout, **rows)
        objective = partial(preference, loss=dpo, reference="start")
        kind: dict[str, Any] = {"objective": objective, "data": pairs}
    else:
        kind = {
            "objective": sft,
            "data": Rows(str(data), format="plain", max_length=length, **rows),
        }
    return Run(
        name="bench",
        weights=case.preset,
        model=family.build(config, dtype=jnp.bfloat16, remat=case.remat, residual=jnp.bfloat16),
        adapter=None if case.trains == "all" else Adapter(rank=16, alpha=32.0),
        quant=None if case.quant == "none" else Quant(case.quant),
        optim=optimizer.Optim(lr=1e-4, warmup=0.0),
        **kind,
    )


def random_base(p: Any) -> Any:
    """Return a random base in the run's storage format, created on the device leaf by leaf."""
    import jax
    import jax.numpy as jnp

    from jaxft.nn import tree
    from jaxft.nn.quant import is_qtensor

    def fill(path: str, x: Any, kind: str = "") -> Any:
        key = jax.random.fold_in(jax.random.key(0), len(path))

        def make() -> Any:
            if x.dtype == jnp.uint16:  # the bits of bfloat16
                values = 0.02 * jax.random.normal(key, x.shape, jnp.bfloat16)
                return jax.lax.bitcast_convert_type(values, jnp.uint16)
            if x.dtype.itemsize == 1 and kind == "fp8":  # random bits would contain NaN
                values = jax.random.normal(key, x.shape).astype(jnp.float8_e4m3fn)
                return jax.lax.bitcast_convert_type(values, x.dtype)
            if x.dtype.itemsize == 1:
                return jax.random.bits(key, x.shape, jnp.uint8).astype(x.dtype)
            if path.endswith(("norm", "outer", "mean", "scale")):
                return jnp.full(x.shape, 1.0 if path.endswith("norm") else 0.02, x.dtype)
            return 0.02 * jax.random.normal(key, x.shape, x.dtype)

        return jax.jit(make, out_shardings=x.sharding)()

    base = tree.combine(p.state.trainable, p.frozen)["base"]

    def fill_leaf(path: str, leaf: Any) -> Any:
        if is_qtensor(leaf):
            return tree.map_with_path(lambda part, x: fill(f"{path}/{part}", x, leaf.kind), leaf)
        return fill(path, leaf)

    return tree.map_with_path(fill_leaf, base, is_leaf=is_qtensor)


def kernels(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    """Return the slowest kernels of a trace, each with its fraction of the time; none without a GPU."""
    import jax

    spent: dict[str, float] = {}
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            spent[event.name] = spent.get(event.name, 0.0) + event.duration_ns
    total = sum(spent.values())
    first = sorted(spent.items(), key=lambda item: -item[1])[:count]
    return [{"name": name, "fraction": round(time / total, 3)} for name, time in first]


def train_case(case: Case, tiny: bool, folder: Path) -> dict[str, Any]:
    """Measure speed and memory of a train step. Raises ValueError if its loss or a metric is not finite."""
    import jax

    from jaxft.distributed import devices, sharding
    from jaxft.nn import param_spec, tree
    from jaxft.train import programs

    data = folder / "rows.jsonl"
    length = case.row_length(tiny)
    if case.profile:
        rows = pairs_of(case.profile, 4 * case.rows, length // 2)
    else:
        rows = texts(2 * case.rows * 4, length // (2 if case.objective == "dpo" else 4))
    names = ("prompt", "chosen", "rejected") if case.objective == "dpo" else ("prompt", "completion")
    data.write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows))
    run = make_run(case, tiny, data)
    mesh = sharding.make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        source = run.data.open(byte_tokenizer(), sharding.row_shards(mesh), folder)
        p = programs.build(run, WARM + TIMED + 1)
        state, frozen = programs.start(run, p, None, random_base(p))
        batch, _ = source.batch(0, state)
        shape = next(shape for shape in source.shapes if shape.ids.shape == batch.ids.shape)
        step: Any = programs.compile_step(p, shape)
        memory = step.memory_analysis()
        placed, seconds = sharding.shard_batch(p.mesh, batch), []
        for _ in range(WARM + TIMED):
            begin = time.perf_counter()
            state, step_metrics = step(state, frozen, placed)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - begin)
        with jax.profiler.trace(str(folder / "trace")):
            jax.block_until_ready(step(state, frozen, placed))
    values = tree.paths(jax.device_get(step_metrics))
    if wrong := [name for name, value in values.items() if not np.isfinite(np.asarray(value, float)).all()]:
        raise ValueError(
            f"not finite after {WARM + TIMED} steps: {', '.join(wrong)}; see with --tiny on a CPU whether "
            "the device is the cause"
        )
    middle, tokens = float(np.median(seconds[WARM:])), int((batch.segments > 0).sum())
    c = run.model.config
    weights = param_spec.count_params(run.model.specs) - (0 if c.tied else c.vocab * c.width)
    rate = tokens / middle
    # dpo has a forward pass of the reference too
    flops_per_weight = (6 if case.trains == "all" else 4) + (2 if case.objective == "dpo" else 0)
    device = jax.devices()[0]
    planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    planned += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "tokens_per_second": round(rate, 1),
        "step_seconds": round(middle, 4),
        **({"pairs_per_second": round(case.rows / middle, 2)} if case.profile else {}),
        "mfu": round(flops_per_weight * weights * rate / devices.peak_flops(device) / len(jax.devices()), 4),
        "peak_gib": round(devices.memory_gib(device), 3),
        "compiled_gib": round(planned / 2**30, 3),
        "kernels": kernels(folder / "trace"),
    }


def generate_case(case: Case, tiny: bool, folder: Path) -> dict[str, Any]:
    """Measure generation: groups of 8 that share a prompt, lengths that differ, and prompts that wait.

    One token of 64 ends a completion. Random weights make all tokens about equally likely.
    """
    import jax

    from jaxft.distributed import devices, sharding
    from jaxft.engine.programs import compile_engine
    from jaxft.engine.sampling import Sampling, nonfinite_logits
    from jaxft.engine.session import Session, complete
    from jaxft.engine.state import Decoding, slots_for
    from jaxft.train import programs

    (folder / "rows.jsonl").write_text("")
    run = make_run(case, tiny, folder / "rows.jsonl")
    prompt, fresh, count, group = (32, 16, 16, 8) if tiny else (512, 256, 32, 8)
    mesh = sharding.make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        p = programs.build(run, 1)
        base = random_base(p)
        slots = slots_for(count, group, prompt, case.rows)
        stop = tuple(range(0, run.model.config.vocab, 64))
        decoding = Decoding(run.model, Sampling(fresh, temperature=1.0), stop, group)
        engine = compile_engine(decoding, base, slots, mesh)
        prompts = np.random.default_rng(0).integers(3, 300, (count, prompt)).tolist()
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            sampled = complete(Session(engine, base, jax.random.key(0)), prompts)
            seconds.append(time.perf_counter() - begin)
    if nonfinite_logits(sampled.tokens.reshape(-1, fresh)):
        raise ValueError(
            "logits are not finite in generation; see with --tiny on a CPU whether the device is the cause"
        )
    lengths = (sampled.tokens >= 0).sum(-1)
    return {
        "tokens_per_second": round(float(lengths.sum()) / min(seconds[1:]), 1),
        "mean_length": round(float(lengths.mean()), 1),
        "peak_gib": round(devices.memory_gib(jax.devices()[0]), 3),
    }


def main() -> int:
    """Run each case in a separate process, because a process has only one memory peak."""
    a = arguments()
    if not a.here:
        tiny = ["--tiny"] if a.tiny else []
        commands = [[sys.executable, __file__, "--here", "--cases", name, *tiny] for name in a.cases]
        return max(subprocess.run(command, check=False).returncode for command in commands)
    import jax

    for name in a.cases:
        case = CASES[name]
        measure = generate_case if case.objective == "generate" else train_case
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(case, a.tiny, Path(folder))
        device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
        print(
            json.dumps({"case": name, "tiny": a.tiny, **measured, "device": device, "jax": jax.__version__}),
            flush=True,
        )
    return 0


if __name__ == "__main__":
    from jaxft.distributed import xla_flags
    from jaxft.runs import terminal

    xla_flags.apply_settings()  # as a run does
    sys.exit(terminal.one_line_errors(main))
