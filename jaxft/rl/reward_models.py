"""Reward models as rewards: a frozen adapter and head on the run's base, or a sequence classifier with its
own base.

A reward model is a Hugging Face classifier with one label (LlamaForSequenceClassification), or a base with an
adapter and a head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from jaxft.batch import Pairs, Rollout, Tokens, TrainState
from jaxft.data.chat import loss_mask
from jaxft.data.chat.template import settings_for
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.rows.example import Chat, Completion, Example
from jaxft.data.rows.invalid_rows import valid
from jaxft.distributed import sharding
from jaxft.engine.sampling import BUCKET, left_pad
from jaxft.models import adapted
from jaxft.models.model import Model
from jaxft.nn.adapters.lora_rows import check_stackable, of_equal_shapes, with_gains
from jaxft.nn.attention.layer_attention import varies_with_length
from jaxft.nn.quant import Quant
from jaxft.nn.tree import Aux, Params
from jaxft.rl.rewards import Reward, RewardScores, ScoreEpisodes, check_scores
from jaxft.rl.rollout_layout import PackedRows, RolloutPrograms
from jaxft.rl.trajectory import Episodes
from jaxft.runs import run_record
from jaxft.weights import initial_params, pretrained, storage
from jaxft.weights.hf import hf_write, hub
from jaxft.weights.peft import adapter_folders, peft_read

CLASSIFIER = "ForSequenceClassification"  # the end of its architecture's name

# Loading


@dataclass(frozen=True)
class LoadedRewardModel:
    """A frozen reward model on a mesh.

    model: the architecture, with its head and adapter, whose parameters are `params`. pad: id of a padding
    token, at which no reward is read; None without one.
    """

    params: Params
    model: Model
    pad: int | None

    def score(self, params: Params, tokens: Tokens) -> Float[Array, "B"]:
        """Return the reward of each row, which holds one text, read at the last token that isn't `pad`.

        Rows may be padded on either side.
        """
        return score_rows(self.model, params, tokens, self.pad)


def score_rows(model: Model, params: Params, tokens: Tokens, pad: int | None = None) -> Float[Array, "B"]:
    """Return the reward of each row, as LoadedRewardModel.score does."""
    T, valid = tokens.segments.shape[1], tokens.segments > 0
    valid = valid if pad is None else valid & (tokens.ids != pad)
    last_B = jnp.max(jnp.where(valid, jnp.arange(T, dtype=jnp.int32), 0), axis=1)
    h_BTD, _ = model.hidden(params, tokens)
    return adapted.scores(params, jnp.take_along_axis(h_BTD, last_B[:, None, None], axis=1))[:, 0]


def load_reward_model(
    ref: str,
    mesh: jax.sharding.Mesh,
    adapter: str | Path | None = None,
    quant: Quant | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> LoadedRewardModel:
    """Load a reward model onto the mesh, its base in `dtype` or quantised, its head in float32.

    ref: a classifier with one label or, with `adapter`, its base. adapter: a PEFT folder, or a run's, with a
    head. Raises ValueError if `ref` is not a classifier, has several labels, or lacks its head.
    """
    with jax.set_mesh(mesh):
        model = _headless(ref, dtype)
        if adapter is None:
            require_classifier(ref)
            head = adapted.HeadSettings(trained=False)
        else:
            settings = adapter_folders.read_adapter_settings(str(adapter), model)
            head = adapted.HeadSettings(settings, str(adapter), trained=False)
        stored = pretrained.frozen_model(model, quant, ref, head.adapter)
        params = {
            "base": pretrained.load_base(ref, stored, mesh),
            **initial_params.init_all_but_base(stored.model, mesh, 0, head, ref),
        }
    return LoadedRewardModel(params, stored.model, pad_token_of(ref, adapter))


def load_reward_adapters(
    ref: str,
    mesh: jax.sharding.Mesh,
    folders: Mapping[str, Path],
    quant: Quant | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> dict[str, LoadedRewardModel]:
    """Load several adapters with heads onto one base, and return the reward models by the names of `folders`;
    see load_reward_model.

    All have parameters of the same shapes, so that one compiled program scores with each. Raises ValueError
    also for adapters that cannot share a program.
    """
    first = load_reward_model(ref, mesh, next(iter(folders.values())), quant, dtype)
    if len(folders) == 1:
        return dict.fromkeys(folders, first)
    parts_of = {}
    with jax.set_mesh(mesh):
        model = _headless(ref, dtype)
        for name, folder in folders.items():
            pretrained.check_adapter_base(folder, ref)
            parts_of[name] = peft_read.read_parts(folder, model, pretrained.open_files(ref))[0]
        pairs = {name: parts["adapter"] for name, parts in parts_of.items()}
        check_stackable(pairs)
        pairs = {name: with_gains(first.params["base"], pair) for name, pair in pairs.items()}
        out, wide = {}, np.promote_types(model.dtype, np.float32)
        for (name, parts), equal in zip(parts_of.items(), of_equal_shapes(list(pairs.values())), strict=True):
            placed = adapter_folders.on_every_device({**parts, "adapter": equal}, wide, mesh)
            params, pad = {**first.params, **placed}, pad_token_of(ref, folders[name])
            out[name] = LoadedRewardModel(params, first.model, pad)
    return out


def _headless(ref: str, dtype: DTypeLike) -> Model:
    return adapted.with_scalar_head(pretrained.model_for(ref, dtype=dtype))


def read_before_pad(batch: Pairs, pad: int) -> Pairs:
    """If a response ends with the token `pad`, read its reward one token earlier, as transformers does.

    batch: [micro, rows, ...]. If `pad` is the whole response, its reward is read at the prompt's last token.
    """
    last = batch.last.reshape(*batch.ids.shape[:2], -1)
    ends = np.take_along_axis(batch.ids, last, 2).reshape(batch.last.shape)
    prompt = batch.last - batch.lengths
    prompt = prompt if batch.branches is None else prompt[..., :1]
    before = np.where(batch.lengths == 1, prompt, batch.last - 1)
    return replace(batch, last=np.where(ends == pad, np.maximum(before, 0), batch.last))


def pad_token_of(ref: str, adapter: str | Path | None = None) -> int | None:
    """Return the id of a reward model's padding token, at which no reward is read.

    transformers reads a classifier at the last token that isn't pad_token_id of its configuration. The id of
    an adapter is from its own tokenizer, if it has one. None without an id, and for one that no text has,
    such as -1. Raises ValueError for a pad_token_id that is neither an integer nor null.
    """
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        return pretrained.load_tokenizer(str(adapter)).pad_token_id
    pad = pretrained.read_config(hub.locate(ref, config_only=True)).get("pad_token_id")
    if pad is not None and type(pad) is not int:
        raise ValueError(
            f"{ref}: pad_token_id={pad!r:.60} in config.json is no token id. Set a token id, or null."
        )
    return pad if pad is not None and 0 <= pad < 1 << 31 else None


def require_classifier(ref: str) -> None:
    """Raise ValueError unless `ref` is a sequence classifier with one label and its head."""
    config = pretrained.read_config(hub.locate(ref, config_only=True))
    architectures = [str(name) for name in config.get("architectures") or []]
    if not any(name.endswith(CLASSIFIER) for name in architectures):
        got = ", ".join(architectures) or "no architecture"
        raise ValueError(
            f"{ref}: got {got}, expected a sequence classifier (...{CLASSIFIER}) or an adapter with a head. "
            "Set another reward model."
        )
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))  # transformers' default is two
    if labels != 1:
        raise ValueError(
            f"{ref}: the classifier has {labels} labels. Use one with one label as a reward model."
        )
    if not is_classifier(ref):
        raise ValueError(
            f"{ref}: {adapted.SCORE[0]}, the head of a classifier, is missing. Download the model again."
        )


def is_classifier(ref: str) -> bool:
    """Return whether the files of `ref` have a classifier's head."""
    return adapted.SCORE[0] in pretrained.open_files(ref).tensors


# Rewards


@dataclass(frozen=True)
class HeadReward(Reward):
    """A frozen reward model on the run's base: the model in Run.heads with this name.

    pad: id of a padding token. If a completion ends with it, the reward is read one token earlier, as from
    transformers' classifiers.
    """

    name: str = "reward"
    pad: int | None = None

    def prepare(self, programs: RolloutPrograms) -> ScoreEpisodes:
        """Compile the forward pass, and return the scoring function.

        Raises ValueError if the run has no model of this name, and if the model's rope depends on the length
        of a text: completions that share a prompt would have the rope of the longest one.
        """
        model = programs.run.model
        if self.name not in model.heads:
            raise ValueError(
                f"rewards have HeadReward({self.name!r}), but Run.heads lacks that name. Add the model there."
            )
        if varies_with_length(model.attention, programs.max_length):
            raise ValueError(
                f"HeadReward({self.name!r}): the model's rope depends on the length of a text, so a reward "
                "would depend on the longest completion of its prompt; use ModelReward, or lower "
                "data.max_prompt or data.max_new"
            )
        scores_of = programs.compile(partial(head_scores, model, self))

        def score(episodes: Episodes, rows: PackedRows, state: TrainState) -> RewardScores:
            scores = scores_of(rows, state)[: len(episodes.prompts), : episodes.group].ravel()
            return RewardScores(np.where(episodes.lengths.ravel() > 0, scores, np.nan))

        return score


def head_scores(
    model: Model, reward: HeadReward, params: Params, aux: Aux, batch: Rollout
) -> Float[Array, "micro B A"]:
    """Return the reward of each of A completions per row of [micro, rows, ...], read at its last token."""

    def of_microbatch(rows: Rollout) -> Float[Array, "B A"]:
        view, last, branches = adapted.view(params, reward.name), rows.last, rows.branches
        assert last is not None and branches is not None  # rollout_layout.py writes both
        if reward.pad is not None:  # a completion of that one token is read at the prompt's last token
            shared = (rows.segments == 1) & (branches == 0)
            prompt = jnp.maximum(jnp.sum(shared, 1, dtype=jnp.int32) - 1, 0)[:, None]
            at = partial(jnp.take_along_axis, axis=1)
            earlier = jnp.maximum(last - 1, 0)
            earlier = jnp.where(at(branches, earlier) == at(branches, last), earlier, prompt)
            last = jnp.where(at(rows.ids, last) == reward.pad, earlier, last)
        h, _ = model.hidden(view, rows)
        return model.scores(view, jnp.take_along_axis(h, last[:, :, None], axis=1))

    return jax.lax.map(of_microbatch, batch)


@dataclass(frozen=True)
class ModelReward(Reward):
    """A frozen classifier with one label and its own base, tokenizer and chat template.

    quant: quantisation of its layers, None to store them in `dtype`, in which it computes. max_length: the
    most tokens of a prompt with its completion; a longer text has no score. batch: texts per forward pass. A
    truncated completion is scored as if it had ended there.
    """

    ref: str
    quant: Quant | None = None
    max_length: int = 1024
    batch: int = 8
    dtype: DTypeLike = jnp.bfloat16

    @property
    def name(self) -> str:
        """The last part of `ref`."""
        return Path(self.ref).name

    def fingerprint(self) -> str:
        """Return a hash of its weights."""
        return run_record.weights_fingerprint(self.ref)

    def start_lines(self) -> list[str]:
        """Return a warning if the model's run was continued and has not finished again; else []."""
        return run_record.earlier_end_notes(self.ref)

    def resident(self, mesh: jax.sharding.Mesh) -> Params:
        """Return shapes and shardings of its weights, from its configuration alone."""
        stored = pretrained.frozen_model(_headless(self.ref, self.dtype), self.quant, self.ref)
        return storage.sharded_shapes(stored, mesh)

    def prepare(self, programs: RolloutPrograms) -> ScoreEpisodes:
        """Load the weights, compile the forward pass for several row lengths, and return the scoring
        function.
        """
        score_texts = self.load(programs.run.mesh)

        def score(episodes: Episodes, rows: PackedRows, state: TrainState) -> RewardScores:
            prompts = [episodes.prompts.prompts[t.prompt] for t in episodes.trajectories]
            texts = [t.text for t in episodes.trajectories]
            scores = score_texts(prompts, texts, episodes.prompts.template)
            return check_scores(scores, self.name, episodes.row_names)

        return score

    def load(self, mesh: jax.sharding.Mesh) -> Callable[..., Float[np.ndarray, " n"]]:
        """Load the weights and return `(prompts, completions, settings) -> scores`, NaN for a text that is
        too long.

        prompts: chats or texts that end before the response. settings: arguments for the run's chat template;
        the model's own template gets those arguments that it reads.
        """
        loaded = load_reward_model(self.ref, mesh, quant=self.quant, dtype=self.dtype)
        return make_text_scorer(loaded, mesh, self.ref, None, self.max_length, self.batch)


def make_text_scorer(
    loaded: LoadedRewardModel,
    mesh: jax.sharding.Mesh,
    ref: str,
    adapter: Path | None,
    max_length: int = 1024,
    batch: int = 8,
) -> Callable[..., Float[np.ndarray, " n"]]:
    """Compile a loaded reward model for texts, and return `(prompts, completions, settings) -> scores`, NaN
    for a text of more than max_length tokens.

    ref, adapter: the files that it was loaded from, which have its tokenizer. batch: texts per forward pass.
    prompts, settings: see ModelReward.load.
    """
    own_files = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = pretrained.load_tokenizer(str(adapter) if own_files else ref)
    config = pretrained.read_config(hub.locate(ref, config_only=True))
    ends_at_eos = adapter is None and hf_write.READ_AT in config
    jitted = jax.jit(loaded.score, out_shardings=sharding.replicated(mesh))
    empty = {size: left_pad([], batch, size) for size in text_lengths(max_length)}
    programs = {size: jitted.lower(loaded.params, rows).compile() for size, rows in empty.items()}

    def score_texts(
        prompts: Sequence[Chat | Completion],
        completions: Sequence[str],
        settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
    ) -> Float[np.ndarray, " n"]:
        examples = list(map(with_response, prompts, completions))
        used = settings_for(tokenizer, settings)
        tokenised = map(valid, loss_mask.tokenise_examples(examples, tokenizer, loss_mask.NOTHING, used))
        texts = [tokens.ids.tolist() for tokens in tokenised]
        texts = [until_eos(ids, tokenizer) for ids in texts] if ends_at_eos else texts
        scores = np.full(len(texts), np.nan)
        fitting = [i for i, ids in enumerate(texts) if len(ids) <= max_length]
        for start in range(0, len(fitting), batch):
            chosen = fitting[start : start + batch]
            size = next(size for size in programs if size >= max(len(texts[i]) for i in chosen))
            rows = left_pad([texts[i] for i in chosen], batch, size)
            scores[chosen] = np.asarray(programs[size](loaded.params, rows))[: len(chosen)]
        return scores

    return score_texts


def text_lengths(longest: int) -> list[int]:
    """Return the row lengths that programs are compiled for: 64, 128, ... until `longest` tokens fit."""
    lengths = [BUCKET]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return lengths


def until_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """Return a text's ids without the white space that a chat template adds after the last end token."""
    end = max((i for i, token in enumerate(ids) if token == tokenizer.eos_token_id), default=len(ids) - 1)
    return ids[: end + 1] if not tokenizer.decode(ids[end + 1 :]).strip() else ids


def with_response(prompt: Chat | Completion, response: str) -> Example:
    """Return the prompt followed by a response: as plain text, or as the assistant's turn."""
    if isinstance(prompt, Completion):
        return replace(prompt, completion=response)
    turn = {"role": "assistant", "content": response}
    return replace(prompt, messages=(*prompt.messages, turn), response=len(prompt.messages))


def find_reward_model(
    ref: str, model: Model, quant: Quant | None = None, longest: int = 0
) -> tuple[dict[str, adapted.HeadSettings], HeadReward | ModelReward]:
    """Return (models for Run.heads, the reward) of the reward model that `ref` names.

    An adapter with a head (a PEFT folder's or a run's) shares the base of the run's `model`. Its reward is
    read at a completion's last token, or at the one before if the last is the padding token of the adapter's
    own tokenizer. A classifier (a folder, a run with full=true, or org/name@revision on the hub) is a
    separate model, quantised as set by `quant`. longest: tokens of a prompt with its completion; a separate
    model accepts up to twice as many of its own tokens, at least 1024. Raises ValueError if `ref` is not a
    reward model, FileNotFoundError or ValueError for a run without usable weights.
    """
    if (Path(ref) / "metrics.jsonl").is_file():
        run_record.trained_weights(Path(ref))  # raises an error that names a run which isn't finished
    folder = Path(ref) / "model" if (Path(ref) / "model").is_dir() else Path(ref)
    adapter = adapter_folders.adapter_folder(ref)
    has_adapter = (adapter / "adapter_config.json").is_file()
    if "@" in ref or ((folder / "config.json").is_file() and not has_adapter):
        classifier = ref if "@" in ref else str(folder)
        require_classifier(classifier)
        return {}, ModelReward(classifier, quant, max(1024, 2 * longest))
    pad = pad_token_of(ref, adapter) if (adapter / "tokenizer_config.json").is_file() else None
    return {"reward": adapter_folders.reward_head_settings(ref, model)}, HeadReward("reward", pad)
