"""Loss masks: what is learned is exactly the answers and what ends them."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, tiny
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from jaxft.data.chat import loss_mask
from jaxft.data.packing.pack import permutation
from jaxft.data.row_settings import DATE, TemplateSettings
from jaxft.data.rows.example import Chat, Completion, Text
from jaxft.data.rows.invalid_rows import valid

STOCK = ("llama3", "chatml", "gemma", "llama2", "qwen3", "marked", "plain")
WORDS = st.text(st.sampled_from("abc the rank? 12\n\té ü漢字🙂👩‍🔬<|>[]{}\"'"), min_size=1, max_size=30)
WORD = WORDS.map(str.strip).filter(bool)


def conversation(texts, name="rows.jsonl:1"):
    """User and assistant in turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Chat(name, tuple(messages), len(messages) - 1)


def tokenise(example, kind, loss_on="completion"):
    (tokens,) = loss_mask.tokenise_examples([example], tiny(kind), loss_on)
    return valid(tokens)[:2]


def learned_text(kind, ids, learned):
    return tiny(kind).decode(
        ids[learned].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def expected(kind, answers, last):
    """The text that is learned: each answer and what ends it; the templates' own additions are spelled out
    here.
    """
    texts = [answer + KINDS[kind][3] for answer in answers]
    if kind == "llama2":
        texts = [" " + text for text in texts]
    if kind == "qwen3" and last:
        texts[-1] = "<think>\n\n</think>\n\n" + texts[-1]
    if kind == "plain" and last:
        texts[-1] += tiny(kind).eos_token
    return "".join(texts)


@pytest.mark.parametrize("kind", STOCK)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(WORD, min_size=2, max_size=6))
def test_learned_text_is_the_answers_and_their_ends(kind, texts):
    texts = texts[: len(texts) // 2 * 2]
    answers = texts[1::2]
    ids, learned = tokenise(conversation(texts), kind, "assistant")
    assert learned_text(kind, ids, learned) == expected(kind, answers, last=True)
    ids, learned = tokenise(conversation(texts), kind, "completion")
    assert learned_text(kind, ids, learned) == expected(kind, answers[-1:], last=True)


@pytest.mark.parametrize("kind", STOCK)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(WORDS.filter(str.strip), min_size=2, max_size=4))
def test_whitespace_around_a_response_never_loses_a_character_of_it(kind, texts):
    texts = texts[: len(texts) // 2 * 2]
    ids, learned = tokenise(conversation(texts), kind, "completion")
    bare = ["".join(text.split()) for text in (learned_text(kind, ids, learned), texts[-1] + KINDS[kind][3])]
    assert bare[1] in bare[0]


@pytest.mark.parametrize("kind", STOCK)
def test_tokens_are_those_of_transformers_with_one_bos(kind):
    tokenizer, example = tiny(kind), conversation(["what is a rank?", "a number", "why?", "héllo 🙂"])
    ids, _ = tokenise(example, kind, "all")
    target = tokenizer.apply_chat_template(
        list(example.messages), tokenize=True, return_dict=True, date_string=DATE
    )["input_ids"]
    assert ids.tolist()[: len(target)] == target
    assert ids.tolist()[len(target) :] == ([tokenizer.eos_token_id] if kind == "plain" else [])
    if kind in ("llama3", "gemma"):
        assert ids.tolist().count(tokenizer.bos_token_id) == 1


def test_markers_give_the_mask_that_transformers_computes():
    example = conversation(["what is a rank?", "a number 🙂", "and\n\nwhy?", " the matrix has it "])
    ids, learned = tokenise(example, "marked", "assistant")
    theirs = tiny("marked").apply_chat_template(
        list(example.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == theirs["input_ids"]
    assert learned.astype(int).tolist() == theirs["assistant_masks"]


def test_marker_that_leaves_out_the_end_of_turn_still_learns_it():
    tokenizer = tiny.__wrapped__("marked")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "+ '<|im_end|>' }}{% endgen", "}}{% endgen"
    ).replace("{% endgeneration %}{{ '\n'", "{% endgeneration %}{{ '<|im_end|>\n'")
    ((ids, learned, _),) = loss_mask.tokenise_examples([conversation(["a", "bc"])], tokenizer)
    assert tokenizer.decode(ids[learned].tolist()) == "bc<|im_end|>"


@pytest.mark.parametrize("kind", ("llama3", "chatml", "none"))
@pytest.mark.parametrize("pad_is_eos", (True, False))
def test_eos_is_learned_whatever_pad_is(kind, pad_is_eos):
    tokenizer = tiny(kind, pad_is_eos)
    for example in (Completion("r:1", "the rank", " of a matrix"), Text("r:1", "the rank")):
        ((ids, learned, _),) = loss_mask.tokenise_examples([example], tokenizer)
        assert ids[-1] == tokenizer.eos_token_id and learned[-1]
        assert ids.tolist().count(tokenizer.eos_token_id) == 1


@settings(max_examples=100, deadline=None)
@given(prompt=WORDS, completion=WORDS)
def test_plain_completion_is_learned_and_the_prompt_is_not(prompt, completion):
    tokenizer = tiny("llama3")
    ids, learned = tokenise(Completion("r:1", prompt, completion), "llama3")
    alone, joined = tokenizer(prompt).input_ids, tokenizer(prompt + completion).input_ids
    assert ids.tolist()[: len(alone)] == alone  # from which generation starts
    assert learned.tolist() == [False] * len(alone) + [True] * (len(ids) - len(alone))
    if joined[: len(alone)] == alone:  # no token spans the end of the prompt
        assert ids.tolist() == [*joined, tokenizer.eos_token_id]
    assert tokenizer.decode(ids[learned].tolist()) == completion + "<|eot_id|>"


def test_a_completion_after_a_prompt_gets_no_space_that_a_tokenizer_puts_before_a_text():
    """Llama 2's normaliser prepends one. Here a token spans the end of the prompt, so the completion is
    tokenised apart.
    """
    pieces = ["<s>", "</s>", "<unk>", "\u2581", *"abc\n:", "\u2581a", "ab"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("\u2581", "a"), ("a", "b")]))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    for prompt, completion, expected in (("ca", "bc", ["b", "c"]), ("ca", "b a", ["b", "\u2581a"])):
        assert tokenizer.tokenize(prompt + completion)[2] == "ab"
        ((ids, learned, _),) = loss_mask.tokenise_examples([Completion("r:1", prompt, completion)], tokenizer)
        assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["\u2581", "c", "a", *expected, "</s>"]
        assert learned.tolist() == [False] * 3 + [True] * (len(expected) + 1)


def test_all_learns_every_token():
    for example in (conversation(["a", "b"]), Completion("r:1", "a", "b"), Text("r:1", "a b")):
        assert tokenise(example, "llama3", "all")[1].all()


def test_text_that_begins_with_bos_gets_no_second():
    tokenizer = tiny("llama3")
    ids, _ = tokenise(Completion("r:1", "<|begin_of_text|>the", " rank"), "llama3")
    assert ids.tolist().count(tokenizer.bos_token_id) == 1


def test_eos_that_the_tokenizer_adds_is_not_doubled():
    from tokenizers import processors

    tokenizer = tiny.__wrapped__("none")
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", eos)]
    )
    ((ids, learned, _),) = loss_mask.tokenise_examples([Completion("r:1", "the", " rank")], tokenizer)
    assert ids.tolist().count(eos) == 1 and learned[-1]


def stock(name, eos):
    """A template that TRL ships, on a tokenizer that knows its special tokens."""
    trl = pytest.importorskip("trl")
    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = tiny.__wrapped__("none")
    special = sorted(set(re.findall(r"<[|｜][^|｜<> ]+[|｜]>|<(?:start|end)_of_turn>", source)))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": special, "eos_token": eos, "bos_token": "<bos>"}
    )
    tokenizer.chat_template = source
    return loss_mask.template_of(tokenizer)


@pytest.mark.parametrize(
    "name", ("llama3", "qwen2_5", "qwen3_instruct_2507", "gemma", "gemma3", "cohere", "cohere2", "lfm2")
)
@pytest.mark.parametrize("loss_on", ("assistant", "completion"))
def test_prefix_rendering_finds_what_the_markers_of_trl_enclose(name, loss_on):
    eos = {"llama3": "<|eot_id|>", "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>"}.get(
        name, "<|im_end|>"
    )
    for texts in (["q", "one"], ["q", "one", "r", "two\n\nlines 🙂"], ["q", "one"] * 3):
        found = []
        for template in (stock(name, eos), stock(f"{name}_training", eos)):
            r = loss_mask.render(conversation(texts), template, loss_on)
            found.append(
                [r.text[start:end].strip() for start, end in r.learned]
            )  # their markers take the newline after too
        assert found[0] == found[1] and len(found[0]) == (len(texts) // 2 if loss_on == "assistant" else 1)


@pytest.mark.parametrize("name", ("phi3_training", "phi3_5_training"))
def test_markers_of_trl_may_enclose_the_eos_that_ends_the_conversation(name):
    eos, template = "<|endoftext|>", stock(name, "<|endoftext|>")
    r = loss_mask.render(conversation(["q", "one", "r", "two"]), template, "assistant")
    shown = [r.text[start:end].strip() for start, end in r.learned]
    assert shown == ["one<|end|>", "two<|end|>", eos] and not r.end  # and no further EOS is added
    r = loss_mask.render(conversation(["q", "one", "r"]), template, "assistant")
    assert [r.text[start:end] for start, end in r.learned] == ["one<|end|>"]


def test_a_token_that_opens_the_next_turn_is_not_learned():
    for name, end in (
        ("deepseekv3", "<｜end▁of▁sentence｜>"),
        ("cohere2", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("phi3", "<|end|>"),
    ):
        r = loss_mask.render(conversation(["q", "one", "r", "two"]), stock(name, end), "assistant")
        assert [r.text[a:b] for a, b in r.learned] == ["one" + end, "two" + end]


def test_a_template_that_hides_the_answer_is_refused():
    tokenizer = tiny.__wrapped__("none")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content if m.role == 'user' }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    with pytest.raises(ValueError, match="rows.jsonl:1: .* misrenders .* not show the content of message 1"):
        loss_mask.render(conversation(["q", "one"]), loss_mask.template_of(tokenizer))


def test_date_is_pinned_for_string_and_for_function():
    tokenizer = tiny.__wrapped__("llama3")
    assert (
        "Today Date: 26 Jul 2024"
        in loss_mask.render(conversation(["a", "b"]), loss_mask.template_of(tokenizer)).text
    )
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.chat_template
    text = loss_mask.render(
        conversation(["a", "b"]), loss_mask.template_of(tokenizer, TemplateSettings("03 Feb 2025"))
    ).text
    assert text.startswith("2025-02-03") and "Today Date: 03 Feb 2025" in text
    with pytest.raises(ValueError, match=r"data.date='2025' is not a date like '26 Jul 2024'"):
        loss_mask.template_of(tokenizer, TemplateSettings("2025"))


def test_instruction_without_a_template_has_a_plain_form():
    messages = ({"role": "user", "content": "Add 1 and 2"}, {"role": "assistant", "content": "3"})
    ids, learned = tokenise(Chat("r:1", messages, 1, plain=True), "none")
    assert tiny("none").decode(ids.tolist()) == "<s>### Instruction:\nAdd 1 and 2\n\n### Response:\n3</s>"
    assert learned_text("none", ids, learned) == "3</s>"
    with pytest.raises(ValueError, match="rows.jsonl:1: a conversation needs a chat template"):
        tokenise(conversation(["a", "b"]), "none")


def test_a_row_that_the_template_refuses_is_named():
    messages = (
        {"role": "system", "content": "x"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    with pytest.raises(
        ValueError,
        match="r:7: the chat template of .* rejects the row: System role not supported; set data.system",
    ):
        tokenise(Chat("r:7", messages, 2), "gemma")


def test_a_conversation_without_answer_is_named():
    with pytest.raises(ValueError, match="r:9: the loss mask is empty because there is no assistant turn"):
        tokenise(Chat("r:9", ({"role": "user", "content": "a"},), 1), "chatml", "assistant")


def test_tool_calls_are_learned():
    tokenizer = tiny.__wrapped__("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if m.tool_calls %}{{ '<call>' + m.tool_calls[0].name + '</call>' }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "sum"}]},
    ]
    turns += [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "so 3"}]
    ((ids, learned, _),) = loss_mask.tokenise_examples([Chat("r:1", tuple(turns), 3)], tokenizer, "assistant")
    assert tokenizer.decode(ids[learned].tolist()) == "<call>sum</call><|im_end|>so 3<|im_end|>"


@pytest.mark.parametrize("kind", ("llama3", "chatml", "gemma", "marked", "plain"))
def test_prompt_ids_are_where_training_starts_to_learn(kind):
    example = conversation(["what is a rank?", "a number", "why?", "the matrix"])
    ids, learned = tokenise(example, kind, "completion")
    (prompt,) = loss_mask.example_prompt_ids([example], tiny(kind))
    assert prompt == ids[: learned.argmax()].tolist()


def test_order_of_examples_is_kept_among_kinds_and_chunks():
    examples = [
        Text(f"r:{i}", f"the {i}") if i % 3 else conversation([f"a {i}", f"b {i}"])
        for i in permutation(2100, 1)
    ]
    texts = [loss_mask.render(e, loss_mask.template_of(tiny("chatml"))).text for e in examples]
    got = [
        tiny("chatml").decode(ids.tolist())
        for ids, *_ in loss_mask.tokenise_examples(examples, tiny("chatml"))
    ]
    assert all(g.startswith(t) for g, t in zip(got, texts, strict=True))
    assert len(got) == len(examples) and isinstance(got[0], str) and np.unique(got).size == 2100
