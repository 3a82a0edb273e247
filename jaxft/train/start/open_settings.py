"""Settings that a command leaves open: lengths and batches that follow from the user's rows, and a learning
rate that follows from a model other than the recipe's.

They are added to the command as if the user had written them, so that a run's record, a dry run and a plan
show them. Rows that ship with jaxft leave a recipe as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.data.inspection import RowLengths, measure, micro_tokens, percentile
from jaxft.data.packing.pack import round_up
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import LENGTH_STEP, Prompts
from jaxft.data.rows.dataset_rows import find_data
from jaxft.data.rows.mixture import parse_sources
from jaxft.data.sft import Rows
from jaxft.distributed import processes
from jaxft.models.dense_config import DenseConfig
from jaxft.models.model import Model
from jaxft.nn.param_spec import kernel, lead_shape, spec_paths
from jaxft.nn.stack import REMAT, RematPolicy
from jaxft.rl.environments.environment import environment_of
from jaxft.rl.rewards import FunctionReward, exact
from jaxft.rl.rollout_source import Rollouts
from jaxft.runs.run_record import CHECKPOINTS, read_saved_json
from jaxft.runs.settings import config
from jaxft.runs.settings.config import Recipe, Resolved
from jaxft.train.recipes import SHIPPED
from jaxft.train.settings import Run
from jaxft.weights.hf import hub
from jaxft.weights.pretrained import load_tokenizer

COVERED = 99  # percent of the rows that fit into the chosen length
LITTLE = 1.1  # all rows are covered if this takes at most so many times the memory for activations
MICRO_TOKENS = 4096  # the most tokens of a microbatch, unless the recipe itself has more
RUN_STEPS = 100  # approximate steps of a run: the more rows there are, the more a step has
BATCHES = {Rows: (1, 8), PairRows: (4, 16)}  # least and most rows of a step, unless the recipe has more
NEW_TOKENS = 256  # the least tokens of a completion
AUTO = ("lr=auto", "optim.lr=auto")
Data = Rows | PairRows | Prompts
Chosen = dict[str, str]  # settings and their values, as on a command line


# The learning rate

# The best rates that Thinking Machines measured for AdamW and cross-entropy in fine-tuning of Llama models:
# RATE x 10 for LoRA with alpha=32 x (2000 / width) ** EXPONENT (https://thinkingmachines.ai/blog/lora, and
# get_lr of their tinker-cookbook). Other objectives use fractions of it. TRL's defaults are 0.05 of its rate
# for DPO, KTO and GRPO, 0.2 for reward models; DPO of SmolLM2 learns faster with more (scripts/bench).
RATE, OF_LORA, WIDTH, EXPONENT = 5e-5, 10, 2000, 0.781
OF_OBJECTIVE = {"SFT": 1.0, "preferences": 0.1, "a reward model": 0.2, "reinforcement learning": 0.05}


def learning_rate(run: Run) -> float:
    """Return the learning rate that lr=auto means for this run, rounded to two significant digits."""
    full = RATE * OF_OBJECTIVE[objective_kind(run)] * (WIDTH / run.model.config.width) ** EXPONENT
    return float(f"{full * (OF_LORA if run.adapter else 1):.1e}")


def objective_kind(run: Run) -> str:
    """Return the kind of a run's objective, a key of OF_OBJECTIVE: SFT, preferences, ..."""
    if isinstance(run.data, Prompts):
        return "reinforcement learning"
    if isinstance(run.data, PairRows):
        return "preferences" if run.model.generates else "a reward model"
    return "SFT"


def resolve(recipe: Recipe, overrides: list[str]) -> Resolved:
    """Return the settings of a command whose recipe returns a Run, with a learning rate if the command leaves
    it open.

    A rate is chosen for lr=auto. Without a rate, one is also chosen for a model that is not the recipe's, and
    for full=true unless the recipe has a default rate for it.
    """
    resolved = config.resolve_config(recipe, [text for text in overrides if text not in AUTO], Run)
    names = [text.partition("=")[0] for text in overrides if text in AUTO]
    if not names and _is_open(resolved, "lr") and "lr" in resolved.knobs:
        changed = [x for x in ("model", "full") if resolved.knobs.get(x) != resolved.defaults.get(x)]
        follows = resolved.knobs["lr"] is None and changed == ["full"]  # the recipe has a rate for either
        names = ["lr"] if changed and not follows else []
    chosen = {name: str(learning_rate(resolved.value)) for name in names}
    return _with(replace(resolved, line=(recipe, *overrides)), chosen)


# Lengths and batches


def fitted(
    settings: Resolved, devices: int | None = None, root: Path = Path("runs")
) -> tuple[Resolved, list[str]]:
    """Return the settings with lengths and batches chosen for the rows, and lines about them for the user.

    Every process calls it. Rows that cannot be read leave the settings unchanged; the run raises the error.
    devices: number of the run's devices, by default all. root: the folder of runs; a run that has a
    checkpoint keeps the lengths and batches that it began with.
    """
    try:
        return _fitted(settings, devices, root)
    except (ValueError, OSError):
        return settings, _first_lines(settings)  # the run reads the rows too, and its error has the remedy


def _fitted(settings: Resolved, devices: int | None, root: Path) -> tuple[Resolved, list[str]]:
    """Do the same as `fitted`, but raise ValueError or OSError for rows that cannot be read."""
    run, lines = settings.value, _first_lines(settings)
    recorded = processes.from_first_process(lambda: _recorded(settings, root))
    if recorded:
        return _with(settings, recorded), [*lines, f"as the run began: {_written(recorded)}"]
    names = _open_names(settings)
    if not names:
        return settings, lines
    lengths = processes.first_then_others(partial(_measure, run))
    remat = settings.knobs.get("remat", "projections")
    fit = Fit(run, lengths, _budget(settings), remat, devices or jax.device_count())
    chosen = fit.choose(names)
    fitted_settings = _with(
        settings, {_name_of(settings, name): str(value) for name, value in chosen.items()}
    )
    return fitted_settings, [*lines, *replace(fit, run=fitted_settings.value).lines(chosen)]


def fitted_here(settings: Resolved, devices: int | None = None) -> tuple[Resolved, list[str]]:
    """Do the same as `fitted` without any download. If the rows or the tokenizer are not on this machine or
    cannot be read, return the settings unchanged, with a warning. Raises ValueError for rows on this machine
    that a run would refuse.
    """
    names = _open_names(settings)
    if not names and not _has_own_rows(settings):
        return fitted(settings, devices)
    reason = not_here(settings.value)
    try:
        if not reason:
            if not names:
                _measure(settings.value)
            return _fitted(settings, devices, Path("runs"))
    except OSError as error:
        reason = str(error)
    later = "lengths are chosen" if names else "rows are read"
    return settings, [*_first_lines(settings), f"warning: {later} when the run starts: {reason}"]


def not_here(run: Run) -> str:
    """Return why the rows of a run cannot be tokenised without a download, "" if they can."""
    refs = [source.ref for source in parse_sources(run.data.train)]
    away = [ref for ref in refs if not find_data(ref)]
    if away:
        return f"{away[0]} is not a file on this machine"
    return "" if hub.is_here(run.weights) else f"the tokenizer of {run.weights} is not on this machine"


def _measure(run: Run) -> RowLengths:
    data: Any = run.data
    return measure(data, load_tokenizer(run.weights))


def _open_names(settings: Resolved) -> list[str]:
    """Return the names of the data settings that the command leaves open and that follow from the rows, such
    as max_length, batch and micro.

    [] unless the user's rows replace rows that ship with jaxft: a recipe's values fit its own rows.
    """
    data = settings.value.data
    if not _has_own_rows(settings) or not isinstance(data, Rows | PairRows | Prompts):
        return []
    names = ["max_length", "batch", "micro"]
    if isinstance(data, Prompts):
        names = ["max_prompt", "max_new", "micro", *(["max_episode"] if data.max_turns > 1 else [])]
    return [name for name in names if _is_open(settings, name, f"data.{name}")]


def _has_own_rows(settings: Resolved) -> bool:
    """Return whether the user's rows replace a recipe's rows that ship with jaxft."""
    default = settings.defaults.get("data")
    return isinstance(default, str) and _ships(default) and not _ships(settings.value.data.train)


def _ships(data: str) -> bool:
    return all(source.ref in SHIPPED for source in parse_sources(data))


def _is_open(settings: Resolved, *names: str) -> bool:
    written = {text.partition("=")[0].removeprefix("run.") for text in settings.line[1:]}
    return not written & ({*names} | {f"optim.{name}" for name in names if name == "lr"})


def _name_of(settings: Resolved, name: str) -> str:
    """Return the name by which a data setting is set: the recipe's knob if it has one, else data.NAME."""
    return name if name in settings.knobs else f"data.{name}"


def _with(settings: Resolved, more: Chosen) -> Resolved:
    """Return the settings with `more` set, and recorded as chosen by jaxft rather than by the user."""
    if not more:
        return settings
    recipe, *overrides = settings.line
    chosen = {**settings.chosen, **more}
    written = [text for text in overrides if text not in AUTO]
    resolved = config.resolve_config(recipe, [*written, *(f"{k}={v}" for k, v in chosen.items())], Run)
    return replace(resolved, line=settings.line, chosen=chosen)


def _recorded(settings: Resolved, root: Path) -> Chosen:
    """Return the settings that were chosen when the run began and that this command leaves open; {} if the
    run has no checkpoint.
    """
    name, names = settings.value.name, _open_names(settings)
    folder = root / name
    paths = [folder, folder.parent] if "/" in name else [folder]  # the runs of a sweep share its checkpoints
    if not any(path for place in paths for path in place.glob(f"{CHECKPOINTS}/*")):
        return {}
    record = read_saved_json(folder / "config.json")
    values = {_name_of(settings, name): str(record["data"][name]) for name in names}  # without "command"
    chosen: Chosen = record["command"].get("chosen", {}) if "command" in record else values
    return {
        name: value
        for name, value in chosen.items()
        if name not in settings.chosen and _is_open(settings, name.rpartition(".")[2], name)
    }


def _budget(settings: Resolved) -> int:
    """Return the most tokens that a microbatch may have: MICRO_TOKENS, or the tokens of a microbatch with the
    recipe's defaults if these are more.
    """
    data: Any = settings.value.data

    def own(name: str) -> int:
        return settings.defaults.get(name, getattr(data, name))

    rows, length = own("batch") // own("micro"), own("max_length")
    if isinstance(data, Prompts):
        new_tokens = own("max_episode") or own("max_new")
        rows, length = rows // own("minibatches"), own("max_prompt") + own("group") * new_tokens
    return max(MICRO_TOKENS, rows * length)


@dataclass(frozen=True)
class Fit:
    """The facts from which a run's lengths and batches are chosen, and the choice.

    run: its settings, with the recipe's lengths and batches. lengths: token counts of its rows. budget: the
    most tokens of a microbatch. remat: which activations the model stores for the backward pass. devices: a
    microbatch gets at least one row for each of so many devices, if the batch has enough.
    """

    run: Run
    lengths: RowLengths
    budget: int
    remat: RematPolicy = "projections"
    devices: int = 1

    @property
    def data(self) -> Data:
        """The settings of the rows."""
        data: Any = self.run.data
        return data

    @property
    def limit(self) -> str:
        """The name of the data setting that limits the length of rows, such as max_length."""
        return self.data.length_settings[0]

    def choose(self, names: list[str]) -> dict[str, int]:
        """Return {name: value} for the data settings `names`."""
        data, chosen = self.data, dict[str, int]()
        if isinstance(data, Prompts) and "max_new" in names:
            wanted = self._wanted_length() if "max_prompt" in names else data.max_prompt
            chosen["max_new"] = self._new_tokens(wanted)
            if "max_episode" in names:
                chosen["max_episode"] = self._episode_tokens(wanted, chosen["max_new"])
            elif data.max_turns > 1:
                chosen["max_new"] = min(chosen["max_new"], data.episode_length)
        fit = self._with_data(**chosen)
        if self.limit in names and data.too_long != "split":  # split documents lose no tokens at any limit
            chosen[self.limit] = fit._length()
        fit = self._with_data(**chosen)
        if "batch" in names:
            chosen["batch"] = fit._batch(1 if "micro" in names else data.micro)
            fit = fit._with_data(batch=chosen["batch"], micro=1)
        return chosen | ({"micro": fit._micro()} if "micro" in names else {})

    def lines(self, chosen: Mapping[str, Any]) -> list[str]:
        """Return lines about the rows' lengths, the chosen settings and the memory of other settings."""
        data, longest, what = self.data, self.lengths.longest, self.data.unit.removesuffix("s")
        limit = getattr(data, self.limit)
        shown = ", ".join(f"{p} % up to {percentile(longest, p):,}" for p in (50, 90, 99))
        texts = [f"tokens of {self.lengths.described} {what}s: {shown}, the longest {longest.max():,}"]
        texts.append(self._cover_line(limit))
        if isinstance(data, Prompts) and "max_new" in chosen:
            texts.append(self._new_tokens_line())
        tokens = micro_tokens(data, self.lengths, limit)
        memory = activation_bytes(self.run.model, self.remat) * tokens
        texts.append(
            f"a step has {data.units_per_step} {what}{'s' * (data.units_per_step > 1)} in {data.micro} "
            f"microbatch{'es' * (data.micro > 1)} of at most {tokens:,} tokens, whose activations take "
            f"{gib(memory)} (a microbatch may have {self.budget:,} tokens)"
        )
        if isinstance(data, Prompts) and tokens > self.budget and data.micro == data.units_per_step:
            texts.append(
                f"a prompt with its {data.group} completions has more than these {self.budget:,} tokens; if "
                "memory is short, lower group or max_new"
            )
        return [*texts, f"chosen from the rows: {_written(chosen)}"] if chosen else texts

    def _with_data(self, **changes: Any) -> "Fit":
        data: Any = replace(self.data, **changes)
        return replace(self, run=replace(self.run, data=data))

    def _cover_line(self, limit: int) -> str:
        covered, context = self.lengths.covered(limit), self.run.model.config.max_positions
        all_ = min(round_up(int(self.lengths.longest.max()), LENGTH_STEP), max(limit, context))
        if self.data.too_long == "split":
            return self._split_line(limit, max(limit, min(self._wanted_length(), context)))
        if covered == 1:
            which = "the sample" if self.lengths.is_sample else f"all {self.data.unit}"
            return f"{self.limit}={limit} covers {which}"
        tokens = [micro_tokens(self.data, self.lengths, x) for x in (limit, all_)]
        most = "all"
        if self.lengths.covered(all_) < 1:
            allowed = f"the most that the model's {context:,} positions allow"
            most = f"{100 * self.lengths.covered(all_):.1f} %, {allowed},"
        others = {"truncate": "truncated", "drop": "left out", "error": "errors"}[self.data.too_long]
        return (
            f"{self.limit}={limit} covers {100 * covered:.1f} % of "
            f"{'the sample' if self.lengths.is_sample else f'the {self.data.unit}'}, the others are "
            f"{others} (data.too_long); {self.limit}={all_} covers {most} and needs "
            f"{tokens[1] / tokens[0]:.1f} x the memory for activations"
        )

    def _split_line(self, limit: int, longer: int) -> str:
        """Return text about how many documents exceed `limit` tokens and are split. longer: a limit within
        the model's context that would split few; it is recommended.
        """
        split = 1 - self.lengths.covered(limit)
        line = f"longer {self.data.unit} are split (data.too_long), so that no token is lost"
        if split < 1 - COVERED / 100 or longer <= limit:
            return line
        tokens = [micro_tokens(self.data, self.lengths, x) for x in (limit, longer)]
        return (
            f"{line}: {self.limit}={limit} splits {100 * split:.1f} %, and the model reads each part without "
            f"the parts before it; {self.limit}={longer} splits "
            f"{100 * (1 - self.lengths.covered(longer)):.1f} % and needs {tokens[1] / tokens[0]:.1f} x the "
            "memory for activations"
        )

    def _new_tokens_line(self) -> str:
        data, answers = self.data, self.lengths.answers
        assert isinstance(data, Prompts)
        if not len(answers):
            return f"max_new={data.max_new}: the rows have no reference answers whose lengths it could follow"
        return (
            f"max_new={data.max_new} covers {100 * (answers <= data.max_new).mean():.1f} % of the reference "
            f"answers, of which 50 % have up to {percentile(answers, 50):,} tokens"
        )

    def _length(self) -> int:
        """Return a limit that covers COVERED percent of the rows, or all if that takes little more memory; at
        least the recipe's limit, at most the budget and the model's context. For prompts the tokens of
        completions are subtracted from both, but at least half of the budget remains.
        """
        data, context = self.data, self.run.model.config.max_positions
        most = min(context, self.budget // max(1, len(self.lengths.kinds)))
        if isinstance(data, Prompts):
            left = max(self.budget - data.group * data.episode_length, self.budget // 2)
            most = min(context - data.episode_length, left)
        least = min(getattr(data, self.limit), most)
        return max(least, min(self._wanted_length(), max(1, most // LENGTH_STEP) * LENGTH_STEP))

    def _wanted_length(self) -> int:
        """Return a length that fits COVERED percent of the rows, or all if that takes little more memory."""
        fit = self
        if isinstance(self.data, Prompts):
            longer = {"max_new": max(self.data.max_new, NEW_TOKENS)}
            if self.data.max_turns > 1:
                longer["max_episode"] = max(self.data.episode_length, NEW_TOKENS)
            fit = self._with_data(**longer)
        wanted, all_ = (round_up(percentile(self.lengths.longest, p), LENGTH_STEP) for p in (COVERED, 100))
        sizes = [micro_tokens(fit.data, self.lengths, limit) for limit in (wanted, all_)]
        return all_ if sizes[1] <= LITTLE * sizes[0] else wanted

    def _new_tokens(self, prompt: int) -> int:
        """Return the length of completions: enough for the reference answers if the budget allows it, and at
        least NEW_TOKENS. Only a small context lowers it; prompts get at most half of the context.

        prompt: tokens that the prompts need.
        """
        data, answers, context = self.data, self.lengths.answers, self.run.model.config.max_positions
        assert isinstance(data, Prompts)
        wanted = round_up(percentile(answers, COVERED), LENGTH_STEP) if len(answers) else 0
        fits = (self.budget - prompt) // data.group // 8 * 8
        least = max(NEW_TOKENS, data.max_new)
        return min(max(least, min(wanted, fits)), context - min(prompt, context // 2))

    def _episode_tokens(self, prompt: int, new: int) -> int:
        """Return the length of an episode: all turns in full if the budget allows it, and at least one turn
        and the recipe's length.

        prompt: tokens that the prompts need. new: tokens of a turn.
        """
        data, context = self.data, self.run.model.config.max_positions
        assert isinstance(data, Prompts)
        fits = (self.budget - prompt) // data.group // 8 * 8
        wanted = max(new, data.episode_length, min(data.max_turns * new, fits))
        return max(new, min(wanted, context - min(prompt, context // 2)))

    def _batch(self, multiple: int) -> int:
        """Return data.batch, a power of two times `multiple`, for a run of about RUN_STEPS steps."""
        data = self.data
        kept = self.lengths.kept(data.max_length)
        rows = float(np.count_nonzero(kept))
        if isinstance(data, Rows) and data.packing:
            rows = kept.sum() / data.max_length
        rows *= self.lengths.scale
        rows *= (data.epochs or 1) * (1 - (data.held_out if isinstance(data.held_out, float) else 0))
        least, most = BATCHES[Rows if isinstance(data, Rows) else PairRows]
        least, most = max(least, self.devices, multiple), max(most, data.batch, self.devices)
        wanted = max(least, min(most, rows / RUN_STEPS))
        return multiple * 2 ** int(np.log2(wanted / multiple))

    def _micro(self) -> int:
        """Return the smallest number of microbatches whose size is within the budget, else the largest."""
        data = self.data
        units = data.units_per_step
        limit = getattr(data, self.limit)
        divisors = [
            n for n in range(1, units + 1) if units % n == 0 and units // n >= min(units, self.devices)
        ]
        sizes = [micro_tokens(replace(data, micro=n), self.lengths, limit) for n in divisors]
        fits = [n for n, size in zip(divisors, sizes, strict=True) if size <= self.budget]
        return (fits or divisors[-1:])[0]


def activation_bytes(model: Model, remat: RematPolicy) -> int:
    """Estimate the bytes per token that all layers store for the backward pass; 0 for a model whose layers
    are not described by a DenseConfig.

    Weights that only some tokens use (MoE) are counted for every token.
    """
    c, saved = model.config, REMAT[remat].saved
    if not isinstance(c, DenseConfig):
        return 0
    heads, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = {"q": heads, "k": keys, "v": keys, "attn_out": heads, "o": c.width}
    count = sum(kind is not None for kind in model.attention.layout)
    to_mlp, from_mlp = _mlp_widths(model)
    if saved is None:
        stored = count * sum(attention.values()) + to_mlp + from_mlp + 2 * c.layers * c.width
    else:
        stored = count * sum(attention.get(name, 0) for name in saved) + ("up" in saved) * to_mlp
    inputs = c.layers * model.residual.itemsize * c.width // REMAT[remat].blocks
    return model.dtype.itemsize * stored + inputs


def _mlp_widths(model: Model) -> tuple[int, int]:
    """Return (summed output widths of the weights into MLP hidden layers, summed input widths of the weights
    out of them), over all layers.
    """
    into = out = 0
    for spec in spec_paths(model.specs).values():
        axes, copies = kernel(spec), math.prod(lead_shape(spec))
        into += copies * spec.shape[-1] if axes and axes.outs in ("mlp", "fused_mlp") else 0
        out += copies * spec.shape[-2] if axes and axes.ins == "from_mlp" else 0
    return into, out


def gib(size: float) -> str:
    """Return a number of bytes as GiB, with the unit."""
    return f"{size / 2**30:.1f} GiB"


def _written(chosen: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in chosen.items())


def _first_lines(settings: Resolved) -> list[str]:
    """Return lines about a chosen learning rate, and about the recipe's reward or environment if the user's
    rows are used with it.
    """
    return [*_rate_lines(settings), *_reward_lines(settings), *_environment_lines(settings)]


def _reward_lines(settings: Resolved) -> list[str]:
    """Return a line if the recipe's reward is used with the user's rows."""
    data: Any = settings.value.data
    knob = next((name for name in ("rewards", "reward") if name in settings.knobs), None)
    is_default = knob is not None and _is_open(settings, knob)
    if not isinstance(data, Rollouts) or not is_default or not _has_own_rows(settings):
        return []
    names = [reward.name for reward in data.rules.rewards if isinstance(reward, FunctionReward)]
    if not names:
        return []
    how = "compares a whole completion with the row's answer and " if names[0] == exact.__name__ else ""
    return [
        f"{knob}= is not set: the recipe's reward, {names[0]}, {how}is meant for the recipe's own rows; set "
        f"{knob}=number, {knob}=json_match or {knob}=file.py:function"
    ]


def _environment_lines(settings: Resolved) -> list[str]:
    """Return a line if the recipe's environment is used with the user's rows, tools or rewards."""
    knobs, defaults, data = settings.knobs, settings.defaults, settings.value.data
    given = any(knobs.get(name) != defaults.get(name) for name in ("data", "tools", "rewards"))
    environment = defaults.get("environment")
    if environment is None or not given or not isinstance(data, Rollouts):
        return []
    if data.environment is not environment or not _is_open(settings, "environment", "data.environment"):
        return []
    played = environment_of(environment)
    what = " and ".join(["its tools"] * bool(played.schemas) + ["its reward"] * played.scored)
    return [
        f"environment= is not set: the recipe's own, {played.name}, is also used, with "
        f"{what or 'its observations'}; environment=none leaves it out"
    ]


def _rate_lines(settings: Resolved) -> list[str]:
    name = next((name for name in ("lr", "optim.lr") if name in settings.chosen), None)
    if name is None:
        return []
    run: Run = settings.value
    kind = "LoRA" if run.adapter else "full fine-tuning"
    return [
        f"{name}={settings.chosen[name]} (auto: {objective_kind(run)}, {kind}, a model of width "
        f"{run.model.config.width})"
    ]
