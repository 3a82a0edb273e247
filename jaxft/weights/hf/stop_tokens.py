"""The token ids that end a completion, from everything that comes with a model."""

from collections.abc import Iterable
from typing import Any

from jaxft.data.chat.template import template_of
from jaxft.models.dense_config import token_ids
from jaxft.models.model import Model
from jaxft.weights.hf.safetensors import read_model_json
from jaxft.weights.hub import hub


def stop_tokens(ref: str, model: Model, tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids that end a completion, in ascending order.

    They are the EOS tokens of the model's config, of generation_config.json of `ref` and of the tokenizer,
    and those that end an assistant turn in its chat template. Raises ValueError if generation_config.json is
    malformed or names an id that the model does not have.
    """
    config = model.config
    return tuple(sorted({*config.eos, *_generation_eos(ref, config.vocab), *tokenizer_ends(tokenizer)}))


def joined_eos(eos: int | list[int] | None, more: Iterable[int]) -> int | list[int] | None:
    """Return an eos_token_id with further token ids, as a list if it has several."""
    own = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    ids = list(dict.fromkeys([*own, *more]))
    return ids[0] if len(ids) == 1 else ids or None


def tokenizer_ends(tokenizer: Any) -> list[int]:
    """Return the tokenizer's EOS, and what ends an assistant turn in its chat template."""
    template = template_of(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*eos, *(template.stop_tokens if template else ())]


def _generation_eos(ref: str, vocab: int) -> list[int]:
    """Return the EOS token ids of the model's generation_config.json, [] without one."""
    located = hub.locate(ref, config_only=True)
    path = located.path / "generation_config.json"
    if located.kind != "folder" or not path.is_file():
        return []
    return token_ids(read_model_json(path).get("eos_token_id"), f"{path}: eos_token_id", vocab)


def stop_lines(stop: tuple[int, ...], learned_ends: dict[int, int], tokenizer: Any) -> list[str]:
    """Return lines for the start of a run: where completions end, and training sequences that end otherwise.

    learned_ends: see SourceInfo.
    """

    def named(token: int) -> str:
        return f"{tokenizer.decode([token])!r} ({token})"

    lines = [f"completions end at {', '.join(map(named, stop)) or 'the maximum length alone'}"]
    other = {token: count for token, count in learned_ends.items() if token not in stop}
    if other:
        count, total = sum(other.values()), sum(learned_ends.values())
        most = max(other, key=other.__getitem__)
        lines.append(
            f"warning: {count:,} of {total:,} responses ({100 * count / total:.0f} %) end otherwise, most "
            f"often with {named(most)}: the model learns to end there, but its completions go on; add the "
            "token to eos_token_id in generation_config.json, or use a chat template that ends turns with a "
            "special token"
        )
    return lines
