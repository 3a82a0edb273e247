"""Read Hugging Face folders: safetensors files with a model's tensors, and ids that end a completion."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.chat.template import template_of
from jaxft.models.adapted import SCORE
from jaxft.models.dense_config import token_ids
from jaxft.models.model import Model
from jaxft.models.model_types import TextPart, decoder_prefix, text_part, text_tensor
from jaxft.nn.tensor_names import TIED_HEAD
from jaxft.weights.hf import hub
from jaxft.weights.hf.safetensors import FLOATS, UNSUPPORTED, open_safetensors, read_model_json
from jaxft.weights.quantised.quantised_checkpoints import open_tensors
from jaxft.weights.tensors import ModelFiles, tensors_of

HEAD = TIED_HEAD.template
WEIGHT_INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
COMPARED_VALUES = 1 << 22  # values of a head and an embedding at a time
QUANTISATION_SCALES = (
    ".weight_scale", ".weight_scale_inv", ".input_scale", ".weight_scale_2", ".activation_scale"
)  # fmt: skip
IGNORED_TENSORS = ("rotary_emb.inv_freq", "rope_freqs.weight", "attn.masked_bias")  # buffers in old files


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: the index's files, model.safetensors, or the only one. Raises
    FileNotFoundError for a missing file, ValueError for several files without an index or pickled weights.
    """
    index = folder / WEIGHT_INDEX
    if index.is_file():
        return _indexed_files(folder, index)
    files = sorted(
        p for p in folder.glob("*.safetensors") if not p.name.startswith(("adapter_", "consolidated"))
    )
    if len(files) > 1:
        files = [p for p in files if p.name == "model.safetensors"] or files
    if len(files) > 1:
        raise ValueError(
            f"{folder}: {len(files)} safetensors files, but no {WEIGHT_INDEX} that lists those to read; "
            "download the model again"
        )
    if files:
        return files
    pickled = [p.name for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in sorted(folder.glob(kind))]
    if pickled:
        raise ValueError(
            f"{folder}: its weights are pickled ({pickled[0]}), which can run code, so they are not read. "
            "Convert them where torch is installed: "
            f"transformers.AutoModelForCausalLM.from_pretrained('{folder}')"
            f".save_pretrained('{folder}-safetensors')"
        )
    raise FileNotFoundError(
        f"{folder}: no .safetensors file. If the model has pickled weights only (.bin, .pt), convert it "
        "where torch is: transformers.AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER)"
    )


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    weight_map = read_model_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(
            f"{index}: no valid 'weight_map' (an object of tensor name to file name); download it again"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(
                f"{index}: shard {name!r} is not a plain file name inside the folder; correct the index"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: this shard of {index.name} is missing; download the model again"
            )
    return [folder / name for name in names]


def open_folder(folder: Path) -> ModelFiles:
    """Open a folder's safetensors files; of a multimodal model, the decoder named as a text-only model."""
    path = folder / "config.json"
    stored = open_safetensors(folder, weight_files(folder))
    config = read_model_json(path) if path.is_file() else {}
    files = open_tensors(stored, config.get("quantization_config"))
    if text_part(config) is None:
        return files
    names = decoder_tensors(files.where, files.tensors)
    tensors = {text: files.tensors[name] for text, name in names.items()}
    ignored = files.tensors.keys() - names.values()
    return ModelFiles(files.where, tensors, tuple(name for name in files.tensors if name in ignored))


def decoder_tensors(where: str, stored: Iterable[str]) -> dict[str, str]:
    """Map names of the text-only model to the stored names in a multimodal model's files, for its decoder.

    stored: all names in the files. where: the folder, for messages. Raises ValueError for files without a
    decoder, or with two tensors of the same name in the text-only model.
    """
    names, prefix = dict[str, str](), decoder_prefix(stored)
    if prefix is None:
        raise ValueError(
            f"{where}: no tensor of the text decoder of this multimodal model, only of its other parts; "
            "download the model again"
        )
    for name in stored:
        text = text_tensor(name, prefix)
        if text in names:
            raise ValueError(
                f"{where}: {name} and {names[text]} are the same tensor of the decoder; remove one of them"
            )
        names |= {} if text is None else {text: name}
    return names


def text_part_of(ref: str) -> TextPart | None:
    """Return the text decoder of the multimodal model `ref`; None for others, and if it is not here."""
    path = hub.small_file(ref, "config.json")
    return None if path is None else text_part(read_model_json(path))


def check_tensors(files: ModelFiles, model: Model) -> None:
    """Raise ValueError unless the files contain exactly the model's tensors, in a float dtype.

    Ignored: buffers of old files, a copy of the embedding as tied head, and biases of zeros that GPTQ tools
    add.
    """
    if model.config.layers > len(files.tensors):  # a corrupt number would make a list of millions of names
        raise ValueError(
            f"{files.where}: its config has {model.config.layers} layers, but the files have only "
            f"{len(files.tensors)} tensors; download them again, or use the config.json that belongs to them"
        )
    if SCORE.template in files.tensors and "score" not in model.weight_names:
        raise ValueError(
            f"{files.where}: a sequence classifier, which generates no text; use a language model"
        )
    expected = {t.name: t.shape for tensors in tensors_of(model).values() for t in tensors}
    missing = [name for name in expected if name not in files.tensors]
    if missing:
        raise ValueError(
            f"{files.where}: {len(missing)} of {len(expected)} tensors are missing, the first is "
            f"{missing[0]}; download them again, or use the config.json that belongs to the files"
        )
    allowed = {HEAD} if "head" not in model.weight_names else set()  # some files repeat a tied head
    allowed |= {SCORE.template} if "score" in model.weight_names else set()
    known = expected.keys() | allowed
    extra = [name for name in files.tensors if name not in known and not name.endswith(IGNORED_TENSORS)]
    extra = [name for name in extra if not _is_zero_bias(files, name)]
    scales = [name for name in extra if name.endswith(QUANTISATION_SCALES)]
    if scales:
        raise ValueError(
            f"{files.where}: tensor {scales[0]} is a scale of quantised weights, such as FP8, and "
            "config.json has no quantization_config that describes them; use the model's unquantised weights"
        )
    if extra:
        raise ValueError(
            f"{files.where}: {len(extra)} tensors do not belong to this architecture, the first is "
            f"{extra[0]}; use the config.json that belongs to these files"
        )
    if model.generates and "head" not in model.weight_names and has_other_head(files):
        raise ValueError(
            f"{files.where}: its head is tied to the embedding, but {HEAD} is another matrix; use this "
            "folder itself as the model, whose head is then not tied"
        )
    for name, shape in expected.items():
        stored = files.tensors[name]
        if stored.shape != shape:
            raise ValueError(
                f"{files.where}: {name} has shape {stored.shape}, but its config.json needs {shape}; "
                "use the config.json that belongs to the files"
            )
        if stored.dtype not in FLOATS.values():
            got = "an unknown dtype" if stored.dtype == UNSUPPORTED else f"dtype {stored.dtype}"
            raise ValueError(
                f"{files.where}: {name} has {got}, expected one of {', '.join(FLOATS)}; load the model with "
                "transformers' from_pretrained(MODEL, dtype='bfloat16') and write it with save_pretrained"
            )


def _is_zero_bias(files: ModelFiles, name: str) -> bool:
    """Return whether a tensor is a zero bias that GPTQ tools add. Raises ValueError if it is not zero."""
    stem, dot, _ = name.rpartition(".bias")
    weight = files.tensors.get(f"{stem}.weight")
    if not dot or weight is None or weight.quantised is None:
        return False
    if files.read(name).any():
        raise ValueError(
            f"{files.where}: {name} is not zero, but {stem} has no bias in this architecture; use the "
            "config.json that belongs to the files"
        )
    return True


def has_other_head(files: ModelFiles) -> bool:
    """Return whether the files have a language model head that differs from the embedding in any value."""
    head, table = files.tensors.get(HEAD), files.tensors.get(EMBEDDING)
    if head is None or table is None:
        return False
    if table.shape != head.shape or len(head.shape) != 2:
        return True
    count, rows = head.shape[0], max(1, COMPARED_VALUES // max(1, head.shape[1]))
    parts = (slice(at, min(at + rows, count)) for at in range(0, count, rows))
    return not all(_equal(head.read((part,)), table.read((part,))) for part in parts)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return True
    return np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)


# Token ids that end a completion


def stop_tokens(ref: str, model: Model, tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids that end a completion, in ascending order.

    They are the EOS tokens of the model's config, of generation_config.json of `ref` and of the tokenizer,
    and the ids that end an assistant turn in its chat template. Raises ValueError if generation_config.json
    is malformed or names an id that the model does not have.
    """
    config, located, generation = model.config, hub.locate(ref, config_only=True), list[int]()
    path = located.path / "generation_config.json"
    if located.kind == "folder" and path.is_file():
        eos = read_model_json(path).get("eos_token_id")
        generation = token_ids(eos, f"{path}: eos_token_id", config.vocab)
    return tuple(sorted({*config.eos, *generation, *tokenizer_ends(tokenizer)}))


def joined_eos(eos: int | list[int] | None, more: Iterable[int]) -> int | list[int] | None:
    """Return config.json's eos_token_id with the ids `more` added: an int, a list of several, or None."""
    ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    ids = list(dict.fromkeys([*ids, *more]))
    return ids[0] if len(ids) == 1 else ids or None


def tokenizer_ends(tokenizer: Any) -> list[int]:
    """Return the ids of the tokenizer's EOS and of tokens that end an assistant turn in its template."""
    template = template_of(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*eos, *(template.stop_tokens if template else ())]


def stop_lines(stop: tuple[int, ...], learned_ends: dict[int, int], tokenizer: Any) -> list[str]:
    """Return lines for the start of a run: the tokens `stop` that end completions, and a warning if training
    sequences end with other tokens.

    learned_ends: token id -> number of training sequences that it ends.
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
