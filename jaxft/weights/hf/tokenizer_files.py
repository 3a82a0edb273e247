"""Tokenizer files of folders: read them, and write them so that transformers 4 and 5 load them."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from jaxft.weights.hf.safetensors import read_model_json, write_model_json

TEMPLATES_FOLDER = "additional_chat_templates"  # of transformers, with all of several but the default one
PROCESSOR_TEMPLATE = "chat_template.json"  # of multimodal models by transformers 4
FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.jinja", f"{TEMPLATES_FOLDER}/*.jinja",
)  # fmt: skip
# One of these holds the vocabulary; without any, transformers 5 makes empty tokenizers of some classes.
VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.txt", "merges.txt")
# transformers 4, and vLLM and llama.cpp's converter with it, cannot load these classes of transformers 5.
ONLY_IN_5 = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")
IN_BOTH = "PreTrainedTokenizerFast"  # both take tokenizer.json as it is


def read_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer with transformers, without running code in the folder.

    Return a fast or a slow tokenizer; raises what transformers and tokenizers raise, and FileNotFoundError if
    there is no file with a vocabulary.
    """
    from transformers import AutoTokenizer

    if not any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern)):
        raise FileNotFoundError("no file with a vocabulary")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if tokenizer.chat_template is None and (folder / PROCESSOR_TEMPLATE).is_file():
        tokenizer.chat_template = read_model_json(folder / PROCESSOR_TEMPLATE).get("chat_template")
    return tokenizer


def reading_failed(folder: Path, error: Exception) -> str:
    """Say why a folder's tokenizer cannot be read, and what helps."""
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has a SentencePiece tokenizer.model and no tokenizer.json; write one once, after "
            "`pip install sentencepiece protobuf`, with "
            f"transformers.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        try:
            json.loads((folder / name).read_bytes() if (folder / name).is_file() else "{}")
        except (ValueError, RecursionError) as e:
            return f"{name} is not a complete JSON file ({e}); download it again"
    reason = " ".join(str(error).split())[:300]
    if "contains custom code" in reason:
        reason = "it is code in the folder, which jaxft never runs"
    return f"no tokenizer could be loaded from {folder} ({reason}); it needs a tokenizer.json"


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer so that AutoTokenizer of transformers 4.57 and 5 load it without arguments.

    The files that it was read from are copied unchanged if it has not been changed since and both versions
    know its class. Otherwise its own state is written under a class that both know; of several chat templates
    all are then in tokenizer_config.json. Files of another tokenizer in the folder are removed.
    """
    source = Path(tokenizer.name_or_path) if tokenizer.name_or_path else None
    if source is not None and not (source / "tokenizer.json").is_file():
        source = None
    if source is not None and folder.resolve() == source.resolve():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stale in _files(folder):
        stale.unlink()
    if source is not None and _known_to_both(source) and is_unchanged(tokenizer, source):
        for path in _files(source):
            shutil.copyfile(path, folder / path.name)
        return
    _write_state(folder, tokenizer)
    if source is not None and (source / "tokenizer.model").is_file():  # llama.cpp's converter reads it
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})


def _known_to_both(source: Path) -> bool:
    """Whether transformers 4.57 and 5 read the same tokenizer from a copy of the files in a folder."""
    path = source / "tokenizer_config.json"
    config = read_model_json(path) if path.is_file() else {}
    if (source / TEMPLATES_FOLDER).is_dir():  # a folder of weights has no folders
        return False
    name = config.get("tokenizer_class")  # without one, 4.57 takes the model's class, which may add a BOS
    return (
        isinstance(name, str)
        and name not in ONLY_IN_5
        and not isinstance(config.get("extra_special_tokens"), list)
    )


def is_unchanged(tokenizer: Any, source: Path) -> bool:
    """Whether a tokenizer is that in a folder."""
    if not (source / "tokenizer.json").is_file():
        return False
    return _state(tokenizer) == _state(read_tokenizer(source))


def _state(tokenizer: Any) -> tuple[Any, ...]:
    """The part of a tokenizer that tokens and texts depend on, without the padding and truncation of the last
    call.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"padding": None, "truncation": None}
    return backend, tokenizer.special_tokens_map, tokenizer.chat_template


def _write_state(folder: Path, tokenizer: Any) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template from a tokenizer in memory."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(str(folder), save_jinja_files=not isinstance(tokenizer.chat_template, dict))
    config = read_model_json(folder / "tokenizer_config.json")
    config = {name: value for name, value in config.items() if name not in ("backend", "is_local")}
    config["tokenizer_class"] = IN_BOTH
    if isinstance(config.get("extra_special_tokens"), list):  # 4.57 takes a dict only; 5 reads both names
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    first_step = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in first_step:  # 4.57 would set it to its own default, False
        config["add_prefix_space"] = first_step["add_prefix_space"]
    write_model_json(folder / "tokenizer_config.json", config)
