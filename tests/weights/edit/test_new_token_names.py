"""Names of chat templates and texts of new tokens: what is rendered, added and refused."""

from pathlib import Path

import llama_cpp
import pytest
from tiny_llama import tiny_tokenizer

from jaxft.data.chat.template import template_of
from jaxft.runs.settings.config import load_config
from jaxft.runs.settings.setting_values import parse_value
from jaxft.runs.settings.settings_list import help_text
from jaxft.weights.edit.extended_model import TEMPLATES, Extension, add_tokens, find_template

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
TEXTS = {  # with the start of a response
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST] Yes.</s>[INST] Why?[/INST]",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes.<|end|>\n"
    "<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    "phi4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Yes.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYes.</s>\n"
    "<|user|>\nWhy?</s>\n<|assistant|>\n",
}
STOPS = {
    "gemma": "<end_of_turn>", "mistral": "</s>", "phi3": "<|end|>", "phi4": "<|im_end|>", "zephyr": "</s>",
}  # fmt: skip


def rendered(source, messages, generation=False, **special):
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": generation, **special}
    return render_jinja_template(conversations=[messages], chat_template=source, **options)[0][0]


@pytest.mark.parametrize("name", TEXTS)
def test_a_named_template_renders_turns_adds_its_tokens_and_ends_completions(name):
    tokenizer = tiny_tokenizer()
    add_tokens(tokenizer, Extension(template=name))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == TEXTS[name]
    for token in TEMPLATES[name].tokens:
        assert token in TEXTS[name] and len(tokenizer.encode(token)) == 1
    assert template_of(tokenizer).stop_tokens == (tokenizer.convert_tokens_to_ids(STOPS[name]),)


OF_LLAMA_CPP = {
    "chatml": "chatml", "qwen": "chatml", "llama3": "llama3", "gemma": "gemma", "mistral": "mistral-v3",
    "phi3": "phi3", "phi4": "phi4", "zephyr": "zephyr",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_are_llama_cpps_of_the_same_names(name):
    for count, generation in ((4, True), (3, False), (2, True)):
        theirs = llama_cpp.chat_text_of(OF_LLAMA_CPP[name], CHAT[:count], generation)
        special = {"bos_token": "", "eos_token": "<|endoftext|>" if name == "zephyr" else "</s>"}
        assert rendered(TEMPLATES[name].source, CHAT[:count], generation, **special) == theirs


@pytest.mark.parametrize(
    ("name", "file"), [("gemma", "gemma3"), ("phi3", "phi3"), ("phi3", "phi3_5"), ("llama3", "llama3")]
)
def test_named_templates_are_those_that_trl_ships(name, file):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    theirs = (folder / f"{file}.jinja").read_text()
    for count, generation in ((4, True), (3, False), (2, True)):
        ours = rendered(TEMPLATES[name].source, CHAT[:count], generation)
        end = "</s>" if name == "phi3" and not generation else ""  # after the conversation
        assert ours + end == rendered(theirs, CHAT[:count], generation)


def test_every_template_is_listed_where_a_name_is_wrong():
    for name in ("mixtral", "missing.jinja", ""):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            find_template(name)
        assert all(known in str(caught.value) for known in TEMPLATES) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{% for m in messages %}\n{{ m['content'] + }}\n{% endfor %}", "response: line 2: "),
        (b"{% for m in messages %}{{ m.content + nothing }}{% endfor %}", "response: 'nothing' is undefined"),
        (b"\xff", "byte 0 is not UTF-8"),
    ],
    ids=["syntax", "undefined", "bytes"],
)
def test_a_template_that_cannot_be_rendered_is_named_with_the_cause(tmp_path, text, words):
    path = tmp_path / "mine.jinja"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"{path}: .*{words}") as caught:
        add_tokens(tiny_tokenizer(), Extension(template=str(path)))
    assert "\n" not in str(caught.value)


def test_a_template_that_ends_turns_with_eos_needs_a_tokenizer_with_one():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="chat template zephyr: .*'eos_token' is undefined"):
        add_tokens(tokenizer, Extension(template="zephyr"))


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
def test_a_template_for_a_tokenizer_without_bos_does_not_name_it(name):
    """llama.cpp would render token 11 in its place."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    add_tokens(tokenizer, Extension(template=name))
    assert "bos_token" not in tokenizer.chat_template
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert "<s>" + text == rendered(TEMPLATES[name].source, CHAT, True)


def test_new_tokens_may_contain_one_another_and_a_comma():
    tokenizer = tiny_tokenizer()
    tokens = parse_value('["<a>", "<a>b", "a<a>", "x,y", " z"]', tuple[str, ...])
    ids = list(add_tokens(tokenizer, Extension(tokens)))
    assert tokenizer.encode("<a><a>bx,y z") == [ids[0], ids[1], ids[3], ids[4]]
    assert parse_value("<a>, [b]", tuple[str, ...]) == ("<a>", "[b]")
    assert parse_value("[INST],[/INST]", tuple[str, ...]) == ("[INST]", "[/INST]")


def test_lists_are_shown_as_they_are_written_and_empty_ones_by_name(tmp_path):
    config = tmp_path / "mine.py"
    knobs = 'tokens: tuple[str, ...] = ("a,b", "c"), layers: tuple[int, ...] = ()'
    config.write_text(f"def config({knobs}):\n    return 1\n")
    assert """tokens=["a,b", "c"]""" in help_text(str(config))
    with pytest.raises(ValueError, match=r"layers=x: expected int \(default empty\)"):
        load_config(str(config), ["layers=x"])
