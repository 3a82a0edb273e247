"""New tokens and chat templates: what is written, that it is trained, and that nothing of it is silent."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from scripts_in_process import call
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.models.adapted import adapted
from jaxft.nn.adapters.lora import Adapter
from jaxft.train import trainable_params
from jaxft.train.export import export
from jaxft.weights import pretrained
from jaxft.weights.edit.extended_model import (
    TEMPLATES,
    Extension,
    check_new_tokens,
    extend_model,
    extension_notes,
    untrained_tokens,
    with_new_tokens,
)
from jaxft.weights.hf import hub
from jaxft.weights.peft import peft_write
from jaxft.weights.peft.adapter_folders import cached_base_notes

torch = pytest.importorskip("torch")
NEW = ("<tool>", "</tool>")
OLD = 258  # of tiny_tokenizer; the table has 320 rows


def base_folder(tmp_path, **changes):
    return write_folder(tmp_path / "in", tiny_torch(**changes))


def theirs(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab, rows", [(320, 320), (258, 320)], ids=["spare rows", "grown"])
def test_transformers_has_the_new_tokens_rows_head_template_and_vocabulary(tmp_path, tied, vocab, rows):
    folder = base_folder(tmp_path, tie_word_embeddings=tied, vocab_size=vocab)
    before, old = theirs(folder)
    lines = extend_model(tmp_path / "out", str(folder), Extension(NEW))
    assert "'<tool>' (258), '</tool>' (259)" in lines[0] and ("grows" in lines[0]) == (vocab == 258)
    model, tokenizer = theirs(tmp_path / "out")
    assert tokenizer.chat_template == old.chat_template and len(tokenizer) == OLD + 2
    assert tokenizer.encode("a<tool>b</tool>") == [*old.encode("a"), 258, *old.encode("b"), 259]
    assert tokenizer.decode([258], skip_special_tokens=True) == "<tool>"
    assert model.config.vocab_size == rows and model.config.tie_word_embeddings == tied
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.shape == head.shape == (rows, 64) and (table is head) == tied
    for new, was in [
        (table, before.get_input_embeddings().weight),
        (head, before.get_output_embeddings().weight),
    ]:
        for number, token in zip((258, 259), NEW, strict=True):
            mean = was[old.encode(token)].mean(0)
            np.testing.assert_allclose(new[number].detach(), mean.detach(), atol=1e-6)
        np.testing.assert_array_equal(new[:OLD].detach(), was[:OLD].detach())
    ids = some_tokens(vocab=OLD)
    np.testing.assert_allclose(
        torch_logits(model, ids)[..., :OLD], torch_logits(before, ids)[..., :OLD], atol=1e-5
    )


def test_new_rows_may_start_as_the_mean_of_all_and_the_table_is_padded(tmp_path):
    folder = base_folder(tmp_path, vocab_size=258)
    extend_model(tmp_path / "out", str(folder), Extension(special_tokens=NEW, start="mean", multiple=100))
    model, tokenizer = theirs(tmp_path / "out")
    table = model.get_input_embeddings().weight.detach()
    assert len(table) == 300
    np.testing.assert_allclose(table[258:], np.tile(table[:258].mean(0), (42, 1)), atol=1e-6)
    assert tokenizer.decode([258], skip_special_tokens=True) == ""


def test_an_adapter_that_trains_the_new_rows_is_read_by_peft_on_the_written_base(tmp_path):
    peft = pytest.importorskip("peft")
    folder, out = base_folder(tmp_path, tie_word_embeddings=True), tmp_path / "out"
    extend_model(out, str(folder), Extension(NEW))
    settings = with_new_tokens(Adapter(rank=2, targets=("q",)), str(out))
    assert settings.trainable_token_indices == (258, 259)
    model = pretrained.model_for(str(out), dtype=jnp.float32)
    base = load_on_host(str(out), model, lambda path, array: jnp.asarray(array))
    pair = {"a": jnp.ones((3, 64, 2)), "b": jnp.ones((3, 2, 64)) / 50, "scale": jnp.full(3, settings.scale)}
    rows = jax.random.normal(jax.random.key(0), (2, 64))
    adapter = {"layers": {"attn": {"q": pair}}, "embed": {"rows": rows}}
    peft_write.save_adapter(tmp_path / "a", adapter, settings, model, str(out))
    tokens = some_tokens(vocab=260)
    tokens = tokens.replace(
        ids=np.where(tokens.ids % 5 == 0, 258 + tokens.ids % 2, tokens.ids).astype(np.int32)
    )
    expected = our_logits(adapted(model, settings), {"base": base, "adapter": adapter}, tokens)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "a")).eval()
    np.testing.assert_allclose(torch_logits(loaded, tokens), expected, atol=1e-4)


@pytest.mark.parametrize(
    "tied, adapter, words",
    [
        (True, Adapter(rank=2), "embedding table"),
        (True, Adapter(rank=2, trainable_token_indices=(258,)), "embedding table"),
        (True, Adapter(rank=2, trainable_token_indices=(258, 259)), None),
        (True, Adapter(rank=2, modules_to_save=("embed_tokens",)), "head"),
        (True, Adapter(rank=2, modules_to_save=("embed_tokens", "lm_head")), None),
        (False, Adapter(rank=2, trainable_token_indices=(258, 259)), None),
        (False, Adapter(rank=2, trainable_token_indices=(258, 259), token_head=False), "head"),
        (False, None, None),
    ],
    ids=str,
)
def test_a_run_that_leaves_new_rows_untrained_is_refused_in_one_line(tmp_path, tied, adapter, words):
    folder = base_folder(tmp_path, tie_word_embeddings=tied)
    (folder / "untrained_tokens.json").write_text(
        json.dumps({"tokens": dict(zip(NEW, (258, 259), strict=True))})
    )
    model = pretrained.model_for(str(folder))
    paths = trainable_params.trainable_paths(trainable_params.partition_params(model, adapter, None))
    if words is None:
        check_new_tokens(str(folder), model, adapter, paths)
        return
    with pytest.raises(ValueError, match=f"<tool>, </tool> have untrained rows in the {words}") as caught:
        check_new_tokens(str(folder), model, adapter, paths)
    assert "\n" not in str(caught.value) and "adapter.trainable_token_indices=258,259" in str(caught.value)


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes."}]  # fmt: skip


@pytest.mark.parametrize(
    "name, text, end",
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n", "<|im_end|>"),
        ("qwen", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n", "<|im_end|>"),
        (
            "llama3",
            "user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
            "<|eot_id|>",
        ),
    ],
    ids=lambda x: x if x in TEMPLATES else "",
)  # fmt: skip
def test_a_named_template_comes_with_its_tokens_and_stops(tmp_path, name, text, end):
    folder = base_folder(tmp_path)
    lines = extend_model(tmp_path / "out", str(folder), Extension(template=name))
    _, tokenizer = theirs(tmp_path / "out")
    shown = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert shown.endswith(text) and "Be brief." in shown
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert shown.startswith(prompt)
    assert set(untrained_tokens(str(tmp_path / "out"))) == set(TEMPLATES[name].tokens)
    assert all(
        len(tokenizer.encode(token, add_special_tokens=False)) == 1 for token in TEMPLATES[name].tokens
    )
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids(end) in generation["eos_token_id"] and end in lines[-1]


def test_tokens_of_a_template_that_were_there_before_are_named(tmp_path):
    folder = base_folder(tmp_path)
    extend_model(tmp_path / "out", str(folder), Extension(("<|im_start|>",)))
    note = extend_model(tmp_path / "chat", str(tmp_path / "out"), Extension(template="chatml"))[-2]
    assert note.startswith("'<|im_start|>' of the template") and note.endswith("token_indices=258")
    assert extension_notes(str(tmp_path / "chat")) == [note]  # which a run prints


def test_the_qwen_template_shows_tools_and_calls():
    from transformers import PreTrainedTokenizerFast  # noqa: F401
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        CHAT[1],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    text = render_jinja_template(conversations=[chat], tools=[tool], chat_template=TEMPLATES["qwen"].source)[
        0
    ][0]
    assert '"name": "add"' in text.partition("\n</tools>")[0]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n' in text
    assert text.endswith("<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n")


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, r"\(--tokens, add_tokens=\) .* \(--template, chat_template=\)"),
     ({"tokens": ("x",), "multiple": 0}, "multiple=0; expected at least 1")],
)  # fmt: skip
def test_settings_of_no_extension_are_refused_in_the_words_of_recipe_and_script(settings, words):
    with pytest.raises(ValueError, match=words):
        Extension(**settings)


def test_a_template_of_a_file_must_end_turns_with_a_special_token(tmp_path):
    folder, path = base_folder(tmp_path), tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(ValueError, match="do not end with a special token") as caught:
        extend_model(tmp_path / "out", str(folder), Extension(template=str(path)))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    path.write_text("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    extend_model(tmp_path / "out", str(folder), Extension(template=str(path)))
    assert theirs(tmp_path / "out")[1].chat_template == path.read_text()


def test_what_is_made_of_a_model_with_untrained_rows_has_them_marked_too(tmp_path):
    folder, base, again, out = (tmp_path / name for name in ("in", "base", "again", "out"))
    write_folder(folder, tiny_torch())
    extend_model(base, str(folder), Extension(NEW))
    extend_model(again, str(base), Extension(("<more>",)))
    assert untrained_tokens(str(again)) == {"<tool>": 258, "</tool>": 259, "<more>": 260}
    model = pretrained.model_for(str(base), dtype=jnp.float32)
    source = export.ExportSource(str(base), model, pretrained.load_tokenizer(str(base)))
    export.export_model(out, source, "float32")
    assert untrained_tokens(str(out)) == untrained_tokens(str(base)) == {"<tool>": 258, "</tool>": 259}
    assert not (tmp_path / "base.part").exists()


def test_white_space_around_the_tokens_of_a_command_line_is_no_part_of_them(tmp_path, monkeypatch, capsys):
    options = ("--model", base_folder(tmp_path), "--out", tmp_path / "out", "--tokens", "<tool>, </tool> ")
    code, out, err = call(monkeypatch, capsys, "extend", *options)
    assert code == 0 and "new tokens: '<tool>' (258), '</tool>' (259);" in out, err
    code, _, err = call(
        monkeypatch, capsys, "extend", *options[:2], "--out", tmp_path / "b", "--tokens", "</s> "
    )
    assert code == 1 and "new token '</s>' is a token already" in err and not (tmp_path / "b").exists()


def test_an_adapter_on_a_base_that_only_this_machines_cache_has_is_named_with_the_merged_model(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    ref = str(tmp_path / hub.EXTENDED / "SmolLM2-0123456789abcdef")
    (line,) = cached_base_notes(tmp_path / "out", ref)
    assert "only in this machine's cache" in line and f"--adapter {tmp_path / 'out'} --out merged" in line
    assert not cached_base_notes(tmp_path / "out", "org/base")
