"""Models of their own beside a policy: a classifier as a reward, a whole model as a critic; what a run keeps of its scores."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_place
from test_reward_files import begun, saved
from tiny_run import Place

from jaxft.data import chat
from jaxft.distributed import sharding
from jaxft.inference import generate
from jaxft.models import heads
from jaxft.models.heads import HeadSettings
from jaxft.nn.lora import Adapter
from jaxft.rl import advantages as adv
from jaxft.rl import reward_models, rewards
from jaxft.train import partition
from jaxft.weights import init, pretrained

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny policy's folder, with a classifier of other weights in judge/."""
    folder = tmp_path_factory.mktemp("rl")
    rl_place.write_place(folder)
    t, whole = begun(folder / "base", None)
    whole["base"] = jax.tree.map(lambda x: x * 1.5, whole["base"])
    saved(t, whole, folder / "base", folder / "of", None)
    (folder / "of" / "model").rename(folder / "judge")
    return Place(folder)


def by_transformers(folder, texts):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in texts]


def test_a_classifier_scores_completions_as_transformers_does(place):
    """Strings and messages, of unequal length, more than a batch of them, an empty one too."""
    folder, tokenizer = place.folder / "judge", pretrained.load_tokenizer(str(place.folder / "judge"))
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])
    asked = ["what is 1?", [{"role": "user", "content": "why?"}], "what is 2 plus one plus one?", "so", "so"]
    said = ["it is 1", "because it is so", "4", "", "three " * 9]
    with jax.set_mesh(mesh):
        found = reward_models.ByModel(str(folder), batch=2, dtype=jnp.float32).opened(mesh)(asked, said)
        short = reward_models.ByModel(str(folder), batch=2, max_length=24).opened(mesh)(asked, said)
    texts = [
        ids.tolist()
        for ids, _ in chat.tokenise(reward_models.examples(asked, said, tokenizer), tokenizer, "all")
    ]
    np.testing.assert_allclose(found, by_transformers(folder, texts), rtol=1e-4, atol=1e-4)
    assert [len(ids) > 24 for ids in texts] == np.isnan(short).tolist() and 0 < np.isnan(short).sum() < 5


def test_a_classifier_that_pads_with_its_end_token_is_read_before_it(place):
    """As transformers does; what we write pads with another token, so that it is read at the end."""
    folder = place.folder / "padded"
    shutil.copytree(place.folder / "judge", folder)
    config, tokenizer = (
        json.loads((folder / "config.json").read_text()),
        pretrained.load_tokenizer(str(folder)),
    )
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.eos_token_id}))
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])
    asked, said = ["what is 1?", "why?"], ["it is 1", "because"]
    texts = [
        ids.tolist()
        for ids, _ in chat.tokenise(reward_models.examples(asked, said, tokenizer), tokenizer, "all")
    ]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in texts)
    with jax.set_mesh(mesh):
        models = [
            reward_models.ByModel(str(place.folder / name), dtype=jnp.float32) for name in ("judge", "padded")
        ]
        at_end, before = (model.opened(mesh)(asked, said) for model in models)
    np.testing.assert_allclose(before, by_transformers(folder, texts), rtol=1e-4, atol=1e-4)
    assert np.abs(at_end - before).max() > 0.1


def test_what_a_template_adds_after_the_end_is_left_out_of_ours_and_read_of_others(place):
    """As ChatML's line break: ours was trained to be read at the end token, others by TRL at the end of the whole text."""
    asked, said = ["what is 1?", "why?", "so"], ["it is 1", "because", ""]
    mesh, found = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1]), {}
    for name in ("ours", "others"):
        folder = place.folder / name
        shutil.copytree(place.folder / "judge", folder)
        config, tokenizer = (
            json.loads((folder / "config.json").read_text()),
            pretrained.load_tokenizer(str(folder)),
        )
        tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "</s>\n")
        tokenizer.save_pretrained(str(folder))
        if name == "others":
            del config["reward_read_at"]
            (folder / "config.json").write_text(json.dumps(config))
        with jax.set_mesh(mesh):
            found[name] = reward_models.ByModel(str(folder), dtype=jnp.float32).opened(mesh)(asked, said)
    texts = [
        ids.tolist()
        for ids, _ in chat.tokenise(reward_models.examples(asked, said, tokenizer), tokenizer, "all")
    ]
    assert all(tokenizer.decode(ids).endswith("</s>\n") for ids in texts)
    np.testing.assert_allclose(
        found["others"], by_transformers(place.folder / "others", texts), rtol=1e-4, atol=1e-4
    )
    ends = [reward_models.until_end(ids, tokenizer) for ids in texts]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in ends)
    np.testing.assert_allclose(
        found["ours"], by_transformers(place.folder / "ours", ends), rtol=1e-4, atol=1e-4
    )


def test_our_adapter_reads_a_text_at_its_end_in_peft(place):
    peft = pytest.importorskip("peft")
    t, whole = begun(place.folder / "base")
    folder = saved(t, whole, place.folder / "base", place.folder / "of_adapter")
    tokenizer = pretrained.load_tokenizer(str(folder))
    said = reward_models.examples(["why?", "what is 1?"], ["so", "it is"], tokenizer)
    texts = [ids for ids, _ in chat.tokenise(said, tokenizer, "all")]
    pad = tokenizer.pad_token_id  # what the card names
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=1, pad_token_id=pad
    ).eval()
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])
    loaded = reward_models.load(str(place.folder / "base"), mesh, folder, dtype=jnp.float32)
    size = max(map(len, texts))
    padded = torch.tensor([[*ids, *[pad] * (size - len(ids))] for ids in map(list, texts)])
    with torch.no_grad():
        mask = torch.arange(size)[None] < torch.tensor([len(ids) for ids in texts])[:, None]
        theirs = model(padded, attention_mask=mask.long()).logits[:, 0].numpy()
    np.testing.assert_allclose(
        loaded.score(loaded.params, generate.left_pad(texts, 2)), theirs, rtol=1e-4, atol=1e-4
    )
    unpadded = [
        reward_models.score(loaded.model, loaded.params, generate.left_pad([ids], 1))[0] for ids in texts
    ]
    np.testing.assert_allclose(unpadded, theirs, rtol=1e-4, atol=1e-4)


def test_a_run_is_taught_by_a_classifier_of_its_own(place):
    (place.folder / "judged.py").write_text(
        "from jaxft.rl.reward_models import ByModel\n\njudge = ByModel('judge', max_length=60)\n"
    )
    assert (
        place.run("name=judged", "steps=2", "rewards=judged.py:judge", "batch=4", "group=2", "save=100") == 0
    ), place.err()
    lines = [line for line in place.metrics("judged") if "reward" in line]
    assert all(np.isfinite(line["rewards/judge/mean"]) and line["rewards/judge/std"] > 0 for line in lines)
    table = [
        json.loads(line) for line in (place.runs("judged") / "completions.jsonl").read_text().splitlines()
    ]
    assert any(entry["rewards"]["judge"] is not None for entry in table)


def test_scores_of_a_whole_rollout_are_checked():
    faults = rewards.Faults()
    found = rewards.checked(
        np.array([1.0, np.nan, np.inf]), "judge", [(f"rows:{i}", {}) for i in range(3)], faults
    )
    assert (
        found[0] == 1
        and np.isnan(found[1:]).all()
        and faults.counts["not_a_number"] == 2
        and "rows:1" in faults.first
    )
    with pytest.raises(
        ValueError, match=r"reward judge gave scores of shape \(2,\) for 3 completions; wanted one each"
    ):
        rewards.checked(np.ones(2), "judge", [("", {})] * 3, faults)


def test_a_folder_is_told_apart(place, tmp_path):
    model = pretrained.model_for(str(place.folder / "base"))
    beside, reward = reward_models.as_reward(str(place.folder / "judge"), model)
    assert not beside and isinstance(reward, reward_models.ByModel) and reward.name == "judge"
    with pytest.raises(ValueError, match="wanted a sequence classifier"):
        reward_models.as_reward(str(place.folder / "base"), model)
    beside, reward = reward_models.as_reward(str(tmp_path / "to come"), model)
    assert beside.keys() == {"reward"} and not beside["reward"].trained
    frozen = partition.partition_params(heads.with_heads(model, beside), Adapter(rank=2), None)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])
    with pytest.raises(
        FileNotFoundError, match=r"to come: no such folder .* on the hub is org/name@revision"
    ):
        init.init_all_but_base(frozen.model, mesh, 0, HeadSettings(Adapter(rank=2)), scorers=beside)


SCORED = """
import sys
import jax
from jaxft.distributed import sharding
from jaxft.rl import reward_models
from jaxft.weights import pretrained
mesh = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])
for ref in sys.argv[2:]:
    _, judge = reward_models.as_reward(ref, pretrained.model_for(sys.argv[1]), longest=64)
    with jax.set_mesh(mesh):
        print(judge.name, judge.identity(), judge.opened(mesh)(["what is 1?", "so"], ["it is 1", "why"]).tolist())
"""


def test_a_classifier_on_the_hub_scores_as_its_folder_does(place, tmp_path):
    judge = place.folder / "judge"
    with hub_server.serve(judge, "org/judge") as (endpoint, requests):
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path)}
        env["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
        command = [sys.executable, "-c", SCORED, str(place.folder / "base"), str(judge), "org/judge@v1"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=240)
    here, there = (line.split(maxsplit=2) for line in done.stdout.splitlines() if "judge" in line)
    assert (
        here[2] == there[2]
        and there[0] == "judge@v1"
        and any("model.safetensors" in path for path in requests)
    )


def test_a_classifier_scores_alike_on_a_mesh(place):
    asked, said = ["what is 1?", "why?", "so"], ["it is 1", "because", "so " * 9]
    found = []
    for shape, count in ((sharding.MeshShape(), 1), (sharding.MeshShape(data=2, fsdp=2, tensor=2), 8)):
        mesh = sharding.make_mesh(shape, jax.devices()[:count])
        with jax.set_mesh(mesh):
            judge = reward_models.ByModel(str(place.folder / "judge"), dtype=jnp.float32, max_length=128)
            found.append(judge.opened(mesh)(asked, said))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_a_critic_of_its_own_begins_as_its_files_say_and_shares_nothing(place, kind):
    folder = place.folder / ("base" if kind == "language model" else "judge")
    policy = pretrained.model_for(str(place.folder / "base"), dtype=jnp.float32)
    model = heads.with_heads(policy, {"critic": HeadSettings(weights=str(folder))})
    t = partition.partition_params(
        model,
        None,
        partition.trainable_patterns(model, None, None, {"critic": HeadSettings(weights=str(folder))}),
    )
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        beside = init.init_all_but_base(
            t.model,
            mesh,
            0,
            HeadSettings(),
            str(place.folder / "base"),
            {"critic": HeadSettings(weights=str(folder))},
        )
    critic = beside["critic"]
    loaded = reward_models.load(str(folder), mesh, dtype=jnp.float32) if kind == "classifier" else None
    whole = heads.view({"base": None, "critic": critic}, "critic")
    assert (
        whole["base"] is critic["base"] and "head" not in critic["base"] and critic["score"].shape == (64, 1)
    )
    wanted = loaded.params["base"] if loaded else pretrained.load_frozen(str(folder), policy, mesh)
    jax.tree.map(
        np.testing.assert_array_equal, critic["base"], {name: wanted[name] for name in critic["base"]}
    )
    if loaded:
        np.testing.assert_array_equal(critic["score"], loaded.params["score"])


def test_a_scorer_of_its_own_is_trained_whole():
    with pytest.raises(ValueError, match="weights=base trains them all"):
        HeadSettings(weights="base", trained=False)


def test_ppo_with_a_critic_of_its_own_learns_values_and_resumes(place):
    argv = (
        "passes=2",
        "beta=0.0",
        "batch=16",
        "group=1",
        "lr=2e-3",
        "ppo=true",
        "full_critic=true",
        "max_new=12",
        "save=4",
    )
    argv = (*argv, "rewards=config.py:ascii", "scale=true")
    assert place.run("name=own", "steps=8", *argv) == 0, place.err()
    lines = [line for line in place.metrics("own") if "loss/value_avg" in line]
    assert lines[-1]["loss/value_avg"] < lines[0]["loss/value_avg"]
    process = place.start("name=stopped", "steps=8", *argv, hook=STOP)
    process.join()
    assert process.exitcode == -9 and place.checkpoints("stopped")[-1] == 4
    assert place.run("name=stopped", "steps=8", *argv) == 0, place.err()
    assert place.results("stopped", 8) == place.results("own", 8)


STOP = """
import glob, os, time
from jaxft.train import meter
add = meter.Meter.add
def killed(self, step, batch, found):
    add(self, step, batch, found)
    until = time.monotonic() + 60
    while step == 5 and not glob.glob("runs/stopped/checkpoints/4") and time.monotonic() < until:
        time.sleep(0.01)
    if step == 5:
        os.kill(os.getpid(), 9)
meter.Meter.add = killed
"""


def test_scores_are_divided_by_the_deviation_of_all_so_far(place):
    """And what is logged is as the rewards gave it."""
    argv = (
        "passes=1",
        "beta=0.0",
        "batch=8",
        "group=1",
        "ppo=true",
        "max_new=12",
        "rewards=config.py:ascii",
        "steps=3",
    )
    argv = (*argv, "lr=1e-9")
    assert place.run("name=plain", *argv) == 0, place.err()
    assert place.run("name=scaled", *argv, "scale=true") == 0, place.err()
    plain, scaled = (
        [line for line in place.metrics(name) if "loss/value_avg" in line] for name in ("plain", "scaled")
    )
    table = [
        json.loads(line) for line in (place.runs("scaled") / "completions.jsonl").read_text().splitlines()
    ]
    moments = np.zeros(3)
    for step, (one, other) in enumerate(zip(plain, scaled, strict=True), 1):
        scores = np.array([entry["reward"] for entry in table if entry["step"] == step])
        moments = adv.seen(moments, scores)
        assert one["reward"] == other["reward"] == pytest.approx(scores.mean())
        wanted = adv.scaled(scores, moments).mean()
        assert other["objective/rlhf_reward"] == pytest.approx(wanted, rel=1e-5)
        assert one["objective/rlhf_reward"] == pytest.approx(scores.mean(), rel=1e-5)


def test_the_card_shows_what_was_drawn_with_its_rewards_and_curves(place):
    assert place.run("name=card", "steps=3", "passes=1", "batch=4", "group=2", "save=100", "lr=1e-3") == 0, (
        place.err()
    )
    card = (place.runs("card") / "README.md").read_text()
    assert "| step | prompt | completion | letters | reward |" in card and "![Curves](curves.png)" in card
    assert card.count("\n| 1 | what is") == 5 and card.count("\n| 3 | what is") == 5
    assert (place.runs("card") / "curves.png").read_bytes()[:4] == b"\x89PNG"
