"""Tokenizer files of folders: check and read them, and write them so that transformers 4 and 5 load them.

Downloaded files are checked against limits before a library loads them, because a tokenizer.json contains
steps that rewrite texts. Without limits, a file of a few kilobytes can make a text 2^40 times as long, or
fill the memory when it is loaded.
"""

import base64
import copy
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft.distributed.exit import shorten_error
from jaxft.weights.hf.safetensors import read_model_json, write_model_json

TEMPLATES_FOLDER = "additional_chat_templates"  # transformers' folder of all chat templates but the default
PROCESSOR_TEMPLATE = "chat_template.json"  # which transformers 4 writes for multimodal models
FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.jinja", f"{TEMPLATES_FOLDER}/*.jinja",
)  # fmt: skip
# One of these has the vocabulary; without any, transformers 5 makes empty tokenizers of some classes.
VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.txt", "merges.txt")
# transformers 4, and vLLM and llama.cpp's converter with it, cannot load these classes of transformers 5.
ONLY_IN_5 = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")
IN_BOTH = "PreTrainedTokenizerFast"  # both take tokenizer.json as it is


def read_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer with transformers, without running code in the folder.

    Return a fast or a slow tokenizer. Raises FileNotFoundError if there is no file with a vocabulary, and any
    error of transformers and tokenizers.
    """
    from transformers import AutoTokenizer

    if not any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern)):
        raise FileNotFoundError("no file with a vocabulary")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if tokenizer.chat_template is None and (folder / PROCESSOR_TEMPLATE).is_file():
        tokenizer.chat_template = read_model_json(folder / PROCESSOR_TEMPLATE).get("chat_template")
    return tokenizer


def reading_failed(folder: Path, error: Exception) -> str:
    """Return the reason why a folder's tokenizer cannot be read, and the remedy."""
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
    reason = shorten_error(error)
    if "contains custom code" in reason:
        reason = "it is code in the folder, which jaxft never runs"
    return f"no tokenizer could be loaded from {folder} ({reason}); it needs a tokenizer.json"


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer so that AutoTokenizer of transformers 4.57 and 5 load it without arguments.

    If the tokenizer has not changed since it was read and both versions know its class, its files are copied.
    Otherwise its state is written under PreTrainedTokenizerFast, which both know, with several chat templates
    in tokenizer_config.json. Files of another tokenizer in the folder are removed.
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
    """Return whether transformers 4.57 and 5 read the same tokenizer from a copy of the files in a folder."""
    path = source / "tokenizer_config.json"
    config = read_model_json(path) if path.is_file() else {}
    if (source / TEMPLATES_FOLDER).is_dir():  # copies go into one folder
        return False
    name = config.get("tokenizer_class")  # without one, 4.57 takes the model's class, which may add a BOS
    return (
        isinstance(name, str)
        and name not in ONLY_IN_5
        and not isinstance(config.get("extra_special_tokens"), list)
    )


def is_unchanged(tokenizer: Any, source: Path) -> bool:
    """Return whether a tokenizer equals the one in the folder `source`, apart from padding and truncation."""
    if not (source / "tokenizer.json").is_file():
        return False
    return _state(tokenizer) == _state(read_tokenizer(source))


def _state(tokenizer: Any) -> tuple[Any, ...]:
    """Return everything that a tokenizer's ids and texts depend on, for comparison; padding and truncation,
    which the last call has set, are left out.
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


# Limits

FILE_BYTES = 64 << 20  # of one file; Gemma 3's tokenizer.json has 33 MB
VOCABULARY_TOKENS = 1 << 20  # XLM-V's, the largest published one, has 901,629
ADDED_TOKENS = 1 << 17  # models of speech have 65,536
UNUSED_IDS = 1 << 17  # below the largest id; tokenizers lists them when it writes a tokenizer
TOKEN_CHARACTERS = 1 << 13
SHORT_CHARACTERS = 1 << 10  # of a word (WordPiece's time is quadratic in it), of a template's special token
STEPS = 64  # of a part
GROWTH = 40.0  # factor by which the steps of a part may lengthen a text; T5's do by 36
OPTION_CHARACTERS = 128  # that a step may add to each piece of a text
PATTERN_CHARACTERS = 1 << 16
TEMPLATE_ITEMS = 64  # of a post-processor's template

TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")  # where a part has several steps
CHARSMAP = "precompiled_charsmap"  # SentencePiece's table of normalized characters
ADDED = ("added_tokens", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
JSON_FILES = (
    "tokenizer.json", "tokenizer.*.json", "vocab.json", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json",
)  # fmt: skip
SIZED_FILES = ("*.model", "*.tiktoken", "tekken.json", "vocab.txt", "merges.txt", "*.jinja")


class OverLimit(ValueError):
    """Raised for a tokenizer that exceeds a limit."""


def check_tokenizer_files(folder: Path) -> None:
    """Check the files of a tokenizer against all limits. Raises OverLimit if one is exceeded, ValueError or
    RecursionError for a file that is not JSON.
    """
    for pattern in (*JSON_FILES, *SIZED_FILES):
        for path in folder.glob(pattern):
            if not path.is_file():
                continue
            _check(path.name, "size in bytes", path.stat().st_size, FILE_BYTES)
            if pattern in JSON_FILES:
                value = _read_json(path)
                value = {path.stem: value} if path.name in ("vocab.json", "added_tokens.json") else value
                if isinstance(value, dict):
                    _check_tables(path.name, value)
                if isinstance(value, dict) and path.name.startswith("tokenizer."):
                    _check_parts(path.name, value)


def _read_json(path: Path) -> Any:
    """Read a JSON file with garbage collection off, which takes two thirds of the time for Gemma's merges."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(path.read_bytes())
    finally:
        if enabled:
            gc.enable()


def _check(where: str, what: str, count: float, limit: float) -> None:
    if count > limit:
        raise OverLimit(
            f"{where}: {what} is {count:,.0f}, above the limit of {limit:,.0f}; use another tokenizer"
        )


def _check_tables(name: str, value: dict[str, Any]) -> None:
    for key in ADDED:
        tokens = value.get(key)
        _check(name, f"number of {key}", len(tokens) if isinstance(tokens, list | dict) else 0, ADDED_TOKENS)
    model, added = value.get("model", value), value.get("added_tokens")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict | list):
        _check_model(name, model, [x for x in added if isinstance(x, dict)] if added else [])


def _check_parts(name: str, value: dict[str, Any]) -> None:
    for part in TOKENIZER_PARTS:
        where = f"{name}: {part}"
        steps = [] if value.get(part) is None else list(_steps(where, value[part]))
        _check(where, "number of steps", len(steps), STEPS)
        _check(where, "the factor by which it lengthens a text", _total_growth(steps), GROWTH)
        for step in steps:
            _check_step(where, step)


def _check_model(name: str, model: dict[str, Any], added: list[dict[str, Any]]) -> None:
    """Check the vocabulary and options of a tokenizer.json, and the tokens added to it."""
    vocab = model["vocab"]
    _check(name, "number of tokens", len(vocab), VOCABULARY_TOKENS)
    texts = [*(x.get("content") for x in added)]
    texts += vocab if isinstance(vocab, dict) else [x[0] for x in vocab if isinstance(x, list) and x]
    lengths = (len(text) for text in texts if isinstance(text, str))
    _check(name, "length of the longest token", max(lengths, default=0), TOKEN_CHARACTERS)
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(x.get("id") for x in added)]
    largest = max((x for x in ids if isinstance(x, int)), default=0)
    _check(name, "largest token id", largest, len(texts) + UNUSED_IDS)
    for key, option in model.items():
        if key not in ("vocab", "merges"):
            _check(name, f"length of {key}", len(str(option)), OPTION_CHARACTERS)
    longest = model.get("max_input_chars_per_word")
    _check(name, "max_input_chars_per_word", longest if isinstance(longest, int) else 0, SHORT_CHARACTERS)


def _steps(where: str, part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part of a tokenizer.json, such as its normalizer; sequences are flattened."""
    if not isinstance(part, dict):
        raise OverLimit(f"{where} has a step that is not a JSON object; use another tokenizer")
    nested = [part[key] for key in SEQUENCES if isinstance(part.get(key), list)]
    for item in (item for items in nested for item in items):
        yield from _steps(where, item)
    if not nested:
        yield part


def _total_growth(steps: list[dict[str, Any]]) -> float:
    """Return an upper bound of the factor by which all steps together lengthen a text.

    It is the product of the steps' factors, with one exception: of consecutive steps that each replace a
    character that none of the earlier ones wrote, only the largest factor counts, because at most one of them
    replaces a given character.
    """
    total, largest, written = 1.0, 1.0, ""
    for step in steps:
        literal, content = _literal(step), step.get("content")
        if len(literal) == 1 and isinstance(content, str) and literal not in written:
            largest, written = max(largest, _growth(step)), written + content
        else:
            total, largest, written = total * largest * _growth(step), 1.0, ""
    return total * largest


def _literal(step: dict[str, Any]) -> str:
    """Return the text that a Replace step looks for; "" for a regular expression, and for other steps."""
    pattern = step.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    return literal if isinstance(literal, str) else ""


def _growth(step: dict[str, Any]) -> float:
    """Return an upper bound of the factor by which one step lengthens a text."""
    content, template, literal = step.get("content"), step.get("single"), _literal(step)
    if isinstance(step.get("pattern"), dict) and isinstance(content, str):  # Replace
        if literal:
            return max(1.0, len(content) / len(literal))
        return 1.0 + len(content)  # a regular expression may match between all characters
    if CHARSMAP in step:
        return _longest_replacement(step[CHARSMAP])
    if isinstance(template, list):
        return max(1.0, sum("SpecialToken" not in item for item in template))
    return 2.0 if step.get("type") == "ByteLevel" else 1.0  # a character of two bytes becomes two


def _longest_replacement(charsmap: Any) -> float:
    """Return the length of the longest text in a SentencePiece table of normalized characters."""
    try:
        table = base64.b64decode(charsmap)
    except (ValueError, TypeError):  # which tokenizers refuses
        return 1.0
    texts = table[4 + int.from_bytes(table[:4], "little") :]  # behind a trie and its size
    return float(max(1, *(len(text.decode(errors="replace")) for text in texts.split(b"\0"))))


def _check_step(where: str, step: dict[str, Any]) -> None:
    for key, option in step.items():
        if key in ("single", "pair") and isinstance(option, list):
            _check(where, f"number of items in {key}", len(option), TEMPLATE_ITEMS)
        elif key == "special_tokens" and isinstance(option, dict):
            longest = max((len(str(token)) for token in option.values()), default=0)
            _check(where, "length of a special token", longest, SHORT_CHARACTERS)
        elif key == "pattern":
            _check(where, "length of a pattern", len(str(option)), PATTERN_CHARACTERS)
        elif key != CHARSMAP:
            _check(where, f"length of {key}", len(str(option)), OPTION_CHARACTERS)
