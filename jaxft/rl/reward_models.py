"""Reward models from elsewhere: a sequence classifier's folder, or a language model with an adapter and a head, as a function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.batch import Pairs, Tokens
from jaxft.data import chat
from jaxft.data.formats import Chat, Completion, Example
from jaxft.distributed import sharding
from jaxft.inference import generate
from jaxft.models import heads
from jaxft.models.model import Model
from jaxft.nn.quant import Quant
from jaxft.rl.completions import ByScorer
from jaxft.runs import folder as runfolder
from jaxft.weights import adapters, hf, hub, init, pretrained, storage

KIND = "ForSequenceClassification"


@dataclass(frozen=True)
class Loaded:
    """A frozen scorer on a mesh. score(params, tokens) -> [rows], each row's reward; model: over the whole tree `params`; pad:
    the token that it is never read at, None for none."""

    score: Callable[[Any, Tokens], Array]
    params: Any
    model: Model
    pad: int | None


def load(
    ref: str,
    mesh: Any,
    adapter: str | Path | None = None,
    quant: Quant | None = None,
    dtype: Any = jnp.bfloat16,
) -> Loaded:
    """A reward model on the mesh, its base in `dtype` or packed as `quant` says, its head in float32.

    ref: a Hugging Face classifier with one label (LlamaForSequenceClassification), or with `adapter`, a PEFT folder or a run's
    with a head, the base below it. Raises ValueError for what is no classifier, has several labels, or lacks its head.
    """
    with jax.set_mesh(mesh):
        model = _bare(ref, dtype)
        if adapter is None:
            check(ref)
            start = heads.HeadSettings(trained=False)
        else:
            start = heads.HeadSettings(
                adapters.read_adapter_settings(str(adapter), model), str(adapter), trained=False
            )
        stored = pretrained.frozen_model(model, quant, ref, start.adapter)
        params = {
            "base": pretrained.load_base(ref, stored, mesh),
            **init.init_all_but_base(stored.model, mesh, 0, start, ref),
        }
    pad = padding(ref, adapter)
    return Loaded(lambda params, tokens: score(stored.model, params, tokens, pad), params, stored.model, pad)


def _bare(ref: str, dtype: Any) -> Model:
    return heads.with_scalar_head(pretrained.model_for(ref, dtype=dtype))


def score(model: Model, params: Any, tokens: Tokens, pad: int | None = None) -> Float[Array, "B"]:
    """The reward of each row, read at the last of its tokens that isn't `pad`; rows may be padded in front or behind, and hold
    one text each."""
    h_BTD = model.hidden(params, tokens)
    return heads.scores(params, jnp.take_along_axis(h_BTD, last(tokens, pad)[:, None, None], axis=1))[:, 0]


def last(tokens: Tokens, pad: int | None = None) -> Array:
    """The column of each row's last token that isn't `pad`."""
    T, there = tokens.segments.shape[1], tokens.segments > 0
    there = there if pad is None else there & (tokens.ids != pad)
    return jnp.max(jnp.where(there, jnp.arange(T, dtype=jnp.int32), 0), axis=1)


def read_before(batch: Pairs, pad: int) -> Pairs:
    """A batch [micro, rows, ...] whose answers are read before a `pad` that ends them, as transformers reads its classifiers.

    Before an answer of that one token is its prompt, which by branches stands before the first answer alone.
    """
    ends = np.take_along_axis(batch.ids, batch.last.reshape(*batch.ids.shape[:2], -1), 2).reshape(
        batch.last.shape
    )
    prompt = batch.last - batch.lengths
    prompt = prompt if batch.branches is None else prompt[..., :1]
    prior = np.where(batch.lengths == 1, prompt, batch.last - 1)
    return replace(batch, last=np.where(ends == pad, np.maximum(prior, 0), batch.last))


def padding(ref: str, adapter: str | Path | None = None) -> int | None:
    """The token that a reward model is never read at: transformers' classifiers are read at the last one that isn't their
    configuration's pad_token_id, of an adapter that of the tokenizer beside it."""
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        return pretrained.load_tokenizer(str(adapter)).pad_token_id
    return pretrained.read_config(hub.locate(ref, config_only=True)).get("pad_token_id")


def check(ref: str) -> None:
    """Raise ValueError where the configuration of `ref` isn't that of a classifier with one label."""
    located = hub.locate(ref, config_only=True)
    config = pretrained.read_config(located)
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith(KIND) for kind in kinds):
        found = ", ".join(map(str, kinds)) or "no architecture"
        raise ValueError(
            f"{ref}: found {found}, wanted a sequence classifier (...{KIND}), or an adapter with a head"
        )
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))  # transformers' default is two
    if labels != 1:
        raise ValueError(
            f"{ref}: a classifier of {labels} labels, and a reward model has one; take another folder"
        )
    if not is_classifier(ref):
        raise ValueError(
            f"{ref}: {heads.SCORE[0]} is missing, the head of a sequence classifier; is the download complete?"
        )


def is_classifier(ref: str) -> bool:
    """Whether the files of `ref` hold a classifier's head."""
    return heads.SCORE[0] in pretrained.open_tensors(ref).shapes


@dataclass(frozen=True)
class ByModel:
    """A frozen classifier with one label as a reward of a rollout, with its own tokenizer and chat template (completions.ForAll).

    quant: how its layers are held, None in `dtype`, in which it computes. max_length: tokens of a prompt with its completion; a
    longer one has no score. batch: texts at a time. It reads a whole conversation, so that a completion that the limit cut off
    looks as if it had ended there.
    """

    ref: str
    quant: Quant | None = None
    max_length: int = 1024
    batch: int = 8
    dtype: Any = jnp.bfloat16

    @property
    def name(self) -> str:
        """The last part of where it comes from."""
        return Path(self.ref).name

    def identity(self) -> str:
        """A hash that changes with its weights."""
        return runfolder.weights_fingerprint(self.ref)

    def abstract(self, mesh: Any) -> Any:
        """Shapes and shardings of its weights, from its configuration alone."""
        return storage.sharded_shapes(
            pretrained.frozen_model(_bare(self.ref, self.dtype), self.quant, self.ref), mesh
        )

    def opened(self, mesh: Any) -> Callable[[Sequence[Any], Sequence[str]], np.ndarray]:
        """Its weights on the mesh; (prompts, completions) -> scores."""
        loaded, tokenizer = (
            load(self.ref, mesh, quant=self.quant, dtype=self.dtype),
            pretrained.load_tokenizer(self.ref),
        )
        at_end = hf.READ_AT in pretrained.read_config(hub.locate(self.ref, config_only=True))
        score = jax.jit(loaded.score, out_shardings=sharding.replicated(mesh))
        rows = {size: generate.left_pad([[0] * size], self.batch) for size in sizes(self.max_length)}
        run = {size: score.lower(loaded.params, like).compile() for size, like in rows.items()}

        def scores(asked: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
            texts = [
                ids.tolist()
                for ids, _ in chat.tokenise(examples(asked, completions, tokenizer), tokenizer, "all")
            ]
            texts = [until_end(ids, tokenizer) for ids in texts] if at_end else texts
            out = np.full(len(texts), np.nan)
            known = [i for i, ids in enumerate(texts) if len(ids) <= self.max_length]
            for chosen in (known[at : at + self.batch] for at in range(0, len(known), self.batch)):
                part = [texts[i] for i in chosen]
                size = next(size for size in run if size >= max(map(len, part)))
                padded = generate.left_pad([*part, [0] * size], self.batch + 1)  # the last sets the width
                found = run[size](loaded.params, jax.tree.map(lambda x: x[: self.batch], padded))
                out[chosen] = np.asarray(found)[: len(chosen)]
            return out

        return scores


def sizes(most: int) -> list[int]:
    """Lengths of rows that programs are compiled for: 64, twice that, and so on, until `most` tokens fit."""
    found = [generate.BUCKET]
    while found[-1] < most:
        found.append(2 * found[-1])
    return found


def until_end(ids: list[int], tokenizer: Any) -> list[int]:
    """A text without the white space that a chat template adds after its last end token."""
    end = max((i for i, token in enumerate(ids) if token == tokenizer.eos_token_id), default=len(ids) - 1)
    return ids[: end + 1] if not tokenizer.decode(ids[end + 1 :]).strip() else ids


def examples(asked: Sequence[Any], completions: Sequence[str], tokenizer: Any) -> list[Example]:
    """Prompts, strings or messages, with their completions as a reward model reads them: a conversation, or plain text where
    prompts are and the tokenizer has no chat template."""
    plain = chat.template_of(tokenizer) is None
    out: list[Example] = []
    for i, (prompt, completion) in enumerate(zip(asked, completions, strict=True), 1):
        if isinstance(prompt, str) and plain:
            out.append(Completion(f"completion {i}", prompt, completion))
            continue
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        out.append(
            Chat(f"completion {i}", (*turns, {"role": "assistant", "content": completion}), len(turns))
        )
    return out


def as_reward(
    ref: str, model: Model, quant: Quant | None = None, longest: int = 0
) -> tuple[dict[str, heads.HeadSettings], ByScorer | ByModel]:
    """(what stands beside a run's base, the reward) for the reward model that `ref` names.

    An adapter with a head, a PEFT folder's or a run's, shares the base of the run's `model` and is read at a completion's last
    token, as jaxft trains it; one that was trained to be read at what a chat template puts after the end token is read before
    that. A classifier, a folder's, that of a run with full=true, or org/name@revision on the hub, is a model of its own, its
    layers held as `quant` says. longest: tokens of a prompt with its completion; a model of its own has room for twice as many
    of its own tokens, and for 1024 at least.
    """
    if (Path(ref) / "metrics.jsonl").is_file():
        runfolder.trained_weights(Path(ref))  # a run that isn't finished is told as such
    folder = Path(ref) / "model" if (Path(ref) / "model").is_dir() else Path(ref)
    if "@" in ref or (
        (folder / "config.json").is_file()
        and not (adapters.adapter_folder(ref) / "adapter_config.json").is_file()
    ):
        found = ref if "@" in ref else str(folder)
        check(found)
        return {}, ByModel(found, quant, max(1024, 2 * longest))
    adapter = adapters.adapter_folder(ref)
    unread = padding(ref, adapter) if (adapter / "tokenizer_config.json").is_file() else None
    return {"reward": adapters.reward_head_settings(ref, model)}, ByScorer("reward", unread)
