"""Tokenizers with several chat templates: conversations with tools are rendered by the one named tool_use, as
by transformers' apply_chat_template, in training and in serving, and all of them are written and read again.
"""

import gguf as gguf_package
import huggingface_hub.utils as hub_utils
import pytest
from chat_templates import CHATML, QWEN25, TEMPLATES, TOOLS
from parsed_rows import examples
from tiny_llama import tiny_torch
from transformers import AutoTokenizer

from jaxft.data.chat import loss_mask
from jaxft.data.chat.tool_calls import template_tool_format
from jaxft.data.row_settings import TemplateSettings
from jaxft.data.rows.row_files import Row
from jaxft.serve.served_models import ServedModel, chat_prompt
from jaxft.train.export.push import files_to_push
from jaxft.weights import pretrained
from jaxft.weights.gguf import gguf_tokenizer
from jaxft.weights.gguf.gguf_file import GgufHeader
from jaxft.weights.hf import hub, hub_upload, tokenizer_files

CALLS = [{"id": "a", "type": "function", "function": {"name": "rank", "arguments": {"name": "A"}}}]
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is the rank of A?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "3", "tool_call_id": "a"},
    {"role": "assistant", "content": "It is 3."},
]
# As published ones, it loops over tools without asking whether there are some. It ends with another token.
OF_TOOLS = (
    "{% for tool in tools %}{{ tool.function.name + mood | default('') }}{% endfor %}"
    + QWEN25.replace("<|im_end|>", "<|eot|>")
)


def tokenizer_with(templates):
    tokenizer = TEMPLATES["qwen2.5"].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|eot|>"]})
    tokenizer.chat_template = templates
    return tokenizer


BOTH = {"default": CHATML, "tool_use": OF_TOOLS, "rag": "{{ documents }}"}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(BOTH)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_prompts_and_rows_are_rendered_by_the_template_that_transformers_chooses(tokenizer, tools):
    messages = MESSAGES if tools else [message for message in MESSAGES if not message.get("tool_calls")][:2]
    asked = messages[:2]
    theirs = tokenizer.apply_chat_template(asked, tools=tools, add_generation_prompt=True, tokenize=False)
    assert theirs.startswith("rank") == bool(tools)
    expected = tuple(tokenizer(theirs, add_special_tokens=False).input_ids)
    model = ServedModel("m", tokenizer, (), len(tokenizer))
    assert chat_prompt(model, asked, tools) == expected
    row = examples([Row("row", {"prompt": asked, "completion": [MESSAGES[-1]], "tools": tools})])[0]
    assert tuple(next(loss_mask.example_prompt_ids([row], tokenizer))) == expected
    full = examples(
        [Row("row", {"messages": [*messages, MESSAGES[-1]][: 5 if tools else 3], "tools": tools})]
    )[0]
    ((ids, learned, _),) = loss_mask.tokenise_examples([full], tokenizer, "assistant")
    theirs = tokenizer.apply_chat_template(list(full.messages), tools=tools, tokenize=True)["input_ids"]
    assert ids.tolist() == theirs
    alone = OF_TOOLS.replace("in tools", "in tools or []") if tools else CHATML
    one = tokenizer_with(alone)  # the same mask as with this template alone
    ((same, mask, _),) = loss_mask.tokenise_examples([full], one, "assistant")
    assert ids.tolist() == same.tolist() and learned.tolist() == mask.tolist() and learned.any()
    end = tokenizer.convert_tokens_to_ids("<|eot|>" if tools else "<|im_end|>")
    assert end in ids[learned]


def test_completions_end_as_either_template_ends_turns(tokenizer):
    template = loss_mask.template_of(tokenizer)
    assert tokenizer.convert_ids_to_tokens(template.stop_tokens) == ["<|im_end|>", "<|eot|>"]
    assert template_tool_format(template.tool_use.source) == "hermes" and not template.tool_use.failure
    assert template_tool_format(template.source) == "none"
    assert loss_mask.template_of(tokenizer_with(QWEN25)).tool_use is None
    assert loss_mask.template_of(tokenizer_with({"default": CHATML, "tool_use": CHATML})).tool_use is None


def test_arguments_that_one_of_the_templates_reads_are_taken(tokenizer):
    row = examples([Row("row", {"messages": MESSAGES, "tools": TOOLS})])[0]
    settings = TemplateSettings(chat_template_kwargs=("mood=calm",))
    (ids,) = loss_mask.example_prompt_ids([row], tokenizer, settings)
    assert tokenizer.decode(ids).startswith("rankcalm")
    with pytest.raises(ValueError, match="does not read 'moods'"):
        loss_mask.template_of(tokenizer, TemplateSettings(chat_template_kwargs=("moods=calm",)))


def write_folder(path, templates, in_files):
    """A folder as transformers writes it: templates in files, or as a list in tokenizer_config.json."""
    tiny_torch().save_pretrained(str(path))
    tokenizer_with(templates).save_pretrained(str(path), save_jinja_files=in_files)
    return path


@pytest.mark.parametrize("in_files", [False, True], ids=["list", "files"])
def test_folders_with_several_templates_are_read_written_and_pushed(tmp_path, in_files):
    folder = write_folder(tmp_path / "model", BOTH, in_files)
    assert (folder / tokenizer_files.TEMPLATES_FOLDER / "tool_use.jinja").is_file() == in_files
    tokenizer = pretrained.load_tokenizer(str(folder))
    assert tokenizer.chat_template == BOTH
    tokenizer_files.write_tokenizer(tmp_path / "new", tokenizer)
    assert all(path.is_file() for path in (tmp_path / "new").iterdir())
    assert AutoTokenizer.from_pretrained(str(tmp_path / "new")).chat_template == BOTH
    pushed = files_to_push(folder, "org/name")
    assert ("additional_chat_templates/rag.jinja" in pushed.files) == in_files
    assert not any("not uploaded" in note for note in pushed.notes)


def test_without_a_default_template_a_line_names_the_others(tmp_path):
    folder = write_folder(tmp_path / "model", {"rag": "", "tool_use": OF_TOOLS}, False)
    with pytest.raises(ValueError, match=r"none of its chat templates \(rag, tool_use\) is named default"):
        pretrained.load_tokenizer(str(folder))


def test_only_the_folder_of_templates_comes_from_the_hub():
    files = [
        "config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "onnx/config.json",
        "additional_chat_templates/a/b.jinja", "additional_chat_templates2/b.jinja", "a/config.json",
        "additional/config.json", "z/a/config.json", "additional_chat_templat/x.jinja", "gguf/x.safetensors",
    ]  # fmt: skip
    ignored = hub._all_folders_but(tokenizer_files.TEMPLATES_FOLDER)
    found = hub_utils.filter_repo_objects(
        files, allow_patterns=list(hub.SMALL_FILES), ignore_patterns=ignored
    )
    assert list(found) == files[:3]
    stale = hub_upload.stale_files(files, ["config.json", "model.safetensors"])
    assert stale == files[1:3]


def test_gguf_files_have_the_templates_under_the_keys_of_llama_cpp(tmp_path, tokenizer):
    writer = gguf_package.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_chat_template([{"name": name, "template": text} for name, text in BOTH.items()])
    theirs = {key: part.value for key, part in writer.kv_data[0].items() if "chat_template" in key}
    fields = gguf_tokenizer._special_fields(tokenizer, (), len(tokenizer))
    ours = {field.key: field.value for field in fields if "chat_template" in field.key}
    names = "tokenizer.chat_templates"
    assert {**ours, names: sorted(ours[names])} == {**theirs, names: sorted(theirs[names])}
    assert gguf_tokenizer._chat_templates(GgufHeader(tmp_path, ours, {})) == BOTH
