"""Reward models: a head on the run's base, a separate classifier; a critic with its own base."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hub_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_workdir
import tiny_model
from reward_folders import begun, saved
from rl_completions import LENGTHS, episodes_of, random_completions
from tiny_run import Place

from jaxft.data.chat import loss_mask
from jaxft.data.packing.pack import RowShape
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.row_files import Row
from jaxft.distributed import sharding
from jaxft.engine.sampling import left_pad
from jaxft.models.adapted import HeadSettings, adapted, view, with_heads
from jaxft.models.families.llama import llama
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.attention.layer_attention import uniform
from jaxft.nn.rope import Rope
from jaxft.rl import reward_models
from jaxft.rl.advantages import scale_scores, update_moments
from jaxft.rl.reward_models import HeadReward, ModelReward
from jaxft.rl.rollout_layout import pack_episodes
from jaxft.train import trainable_params
from jaxft.weights import initial_params, pretrained
from jaxft.weights.edit.lora_start import init_magnitudes

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tiny policy's working directory, with a classifier with other weights in judge/."""
    folder = tmp_path_factory.mktemp("rl")
    rl_workdir.write_workdir(folder)
    model, params = begun(folder / "base", None)
    params["base"] = jax.tree.map(lambda x: x * 1.5, params["base"])
    saved(model, params, folder / "base", folder / "of", None)
    (folder / "of" / "model").rename(folder / "judge")
    return Place(folder)


def one_device():
    return sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])


def score_texts(folder, prompts, completions, mesh=None, **options):
    """The scores of a ModelReward."""
    mesh = one_device() if mesh is None else mesh
    with jax.set_mesh(mesh):
        return ModelReward(str(folder), **options).load(mesh)(as_prompts(prompts), completions)


def as_prompts(given):
    """Strings and messages as the prompts of a rollout."""
    return [prompt_of(Row("r", {"prompt": prompt})) for prompt in given]


def token_ids(prompts, completions, tokenizer):
    """The texts that a reward model reads, as lists of ids."""
    examples = list(map(reward_models.with_response, as_prompts(prompts), completions))
    return [ids.tolist() for ids, *_ in loss_mask.tokenise_examples(examples, tokenizer, loss_mask.NOTHING)]


def by_transformers(folder, texts):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in texts]


def test_a_head_on_the_base_scores_each_completion_at_its_end(x64):
    model = with_heads(llama(tiny_model.CONFIG, jnp.float64), {"reward": HeadSettings(Adapter(rank=2))})
    model = adapted(model, Adapter(rank=2))

    def random(path, x):
        return 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape, x.dtype)

    params = tree.map_with_path(random, param_spec.init_params(model.specs, jax.random.key(0), jnp.float64))
    prompts, tokens = random_completions(LENGTHS)

    def scores(lengths, pad=None):
        episodes = episodes_of(prompts, tokens[:, : lengths.shape[1]], lengths)
        rows = jax.tree.map(lambda x: x[None], pack_episodes(episodes, [RowShape(32, 16)]).rows)
        return np.asarray(reward_models.head_scores(model, HeadReward("reward", pad), params, {}, rows))[0]

    def alone(text):
        """The score of one text, read at its last token."""
        row = tiny_model.batch_of([[(np.array(text), 1)]], 16, 16, 1.0)
        h = model.hidden(view(params, "reward"), row)[0][0, len(text) - 1]
        return h @ params["reward"]["score"][:, 0]

    plain = scores(LENGTHS)
    for g, prompt in enumerate(prompts.ids):
        for n in np.flatnonzero(LENGTHS[g]):
            expected = alone([*prompt, *tokens[g, n, : LENGTHS[g, n]]])
            np.testing.assert_allclose(plain[g, n], expected, rtol=1e-10)
    for n in (0, 1):  # a completion that is padding alone is read at its prompt, whatever the other one is
        short = np.where(np.arange(2) == n, 1, [[2, 3], [5, 5]])
        padded = scores(short, pad=int(tokens[0, n, 0]))
        np.testing.assert_allclose(padded[0, n], alone(prompts.ids[0]), rtol=1e-10)
    padded = scores(LENGTHS, pad=int(tokens[1, 1, 4]))  # the last token of one of them
    np.testing.assert_allclose(padded[1, 1], alone([*prompts.ids[1], *tokens[1, 1, :4]]), rtol=1e-10)


def test_a_head_on_the_policy_is_refused_where_a_reward_would_depend_on_another_completion():
    varying = uniform(2, 8, Rope(kind="dynamic", factor=2.0, original_max_positions=64))
    run = SimpleNamespace(model=SimpleNamespace(heads=("reward",), attention=varying))
    programs = SimpleNamespace(run=run, max_length=65)
    with pytest.raises(ValueError, match=r"HeadReward\('reward'\): the model's rope .* use ModelReward, or"):
        HeadReward().prepare(programs)
    programs = SimpleNamespace(run=run, max_length=64, compile=lambda score: score)
    assert callable(HeadReward().prepare(programs))


def test_a_classifier_scores_completions_as_transformers_does(workdir):
    """Strings and messages, of unequal length, more than a batch of them, an empty one too."""
    folder = workdir.folder / "judge"
    tokenizer = pretrained.load_tokenizer(str(folder))
    prompts = [
        "what is 1?",
        [{"role": "user", "content": "why?"}],
        "what is 2 plus one plus one?",
        "so",
        "so",
    ]
    completions = ["it is 1", "because it is so", "4", "", "three " * 9]
    scores = score_texts(folder, prompts, completions, batch=2, dtype=jnp.float32)
    short = score_texts(folder, prompts, completions, batch=2, max_length=24)
    texts = token_ids(prompts, completions, tokenizer)
    np.testing.assert_allclose(scores, by_transformers(folder, texts), rtol=1e-4, atol=1e-4)
    assert [len(ids) > 24 for ids in texts] == np.isnan(short).tolist() and 0 < np.isnan(short).sum() < 5


def test_a_classifier_whose_padding_is_the_end_token_is_read_before_it(workdir):
    """As transformers does. Ours pad with another token, so that they are read at the end token."""
    folder = workdir.folder / "padded"
    shutil.copytree(workdir.folder / "judge", folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = pretrained.load_tokenizer(str(folder))
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.eos_token_id}))
    prompts, completions = ["what is 1?", "why?"], ["it is 1", "because"]
    texts = token_ids(prompts, completions, tokenizer)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in texts)
    at_end, before = (
        score_texts(workdir.folder / name, prompts, completions, dtype=jnp.float32)
        for name in ("judge", "padded")
    )
    np.testing.assert_allclose(before, by_transformers(folder, texts), rtol=1e-4, atol=1e-4)
    assert np.abs(at_end - before).max() > 0.1


def test_white_space_after_the_end_token_is_dropped_for_our_classifiers_only(workdir):
    """Such as ChatML's line break: our classifiers are read at the end token, TRL's at the last token of the
    text.
    """
    prompts, completions, scores = ["what is 1?", "why?", "so"], ["it is 1", "because", ""], {}
    for name in ("ours", "others"):
        folder = workdir.folder / name
        shutil.copytree(workdir.folder / "judge", folder)
        tokenizer = pretrained.load_tokenizer(str(folder))
        tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "</s>\n")
        tokenizer.save_pretrained(str(folder))
        if name == "others":
            config = json.loads((folder / "config.json").read_text())
            del config["reward_read_at"]
            (folder / "config.json").write_text(json.dumps(config))
        scores[name] = score_texts(folder, prompts, completions, dtype=jnp.float32)
    texts = token_ids(prompts, completions, tokenizer)
    assert all(tokenizer.decode(ids).endswith("</s>\n") for ids in texts)
    expected = by_transformers(workdir.folder / "others", texts)
    np.testing.assert_allclose(scores["others"], expected, rtol=1e-4, atol=1e-4)
    trimmed = [reward_models.until_eos(ids, tokenizer) for ids in texts]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in trimmed)
    expected = by_transformers(workdir.folder / "ours", trimmed)
    np.testing.assert_allclose(scores["ours"], expected, rtol=1e-4, atol=1e-4)


def test_our_adapter_scores_as_peft_does_for_rows_padded_or_not(workdir):
    peft = pytest.importorskip("peft")
    base = workdir.folder / "base"
    model, params = begun(base)
    folder = saved(model, params, base, workdir.folder / "of_adapter")
    tokenizer = pretrained.load_tokenizer(str(folder))
    texts = token_ids(["why?", "what is 1?"], ["so", "it is"], tokenizer)
    pad = tokenizer.pad_token_id  # as the model card says
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=1, pad_token_id=pad
    ).eval()
    loaded = reward_models.load_reward_model(str(base), one_device(), folder, dtype=jnp.float32)
    size = max(map(len, texts))
    padded = torch.tensor([[*ids, *[pad] * (size - len(ids))] for ids in texts])
    with torch.no_grad():
        mask = torch.arange(size)[None] < torch.tensor([len(ids) for ids in texts])[:, None]
        expected = theirs(padded, attention_mask=mask.long()).logits[:, 0].numpy()
    scores = loaded.score(loaded.params, left_pad(texts, 2))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    unpadded = [replace(loaded, pad=None).score(loaded.params, left_pad([ids], 1))[0] for ids in texts]
    np.testing.assert_allclose(unpadded, expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_score_as_each_alone_in_one_program(workdir, monkeypatch):
    base, folders = workdir.folder / "base", {}
    monkeypatch.setattr(reward_models, "pad_token_of", lambda ref, folder: {"narrow": 7}.get(folder.name))
    kinds = {
        "wide": Adapter(rank=4, targets=("q", "v")),
        "dora": Adapter(rank=3, targets=("v",), dora=True),
        "narrow": Adapter(rank=2, targets=("k", "down")),
    }
    for name, settings in kinds.items():
        model, params = begun(base, settings)
        params["score"] = params["score"] * settings.rank
        if settings.dora:
            started = init_magnitudes(params["base"], params["adapter"])
            params["adapter"] = tree.map_with_path(
                lambda path, x: 1.5 * x if path.endswith("/magnitude") else x, started
            )
        folders[name] = saved(model, params, base, workdir.folder / name, settings)
    rows = left_pad([[5, 6, 7], [8, 9]], 2)
    together = reward_models.load_reward_adapters(str(base), one_device(), folders, dtype=jnp.float32)
    traced = []

    @jax.jit
    def program(params, rows):
        traced.append(params)
        return together["wide"].score(params, rows)

    for name, folder in folders.items():
        alone = reward_models.load_reward_model(str(base), one_device(), folder, dtype=jnp.float32)
        expected = alone.score(alone.params, rows)
        found = together[name].score(together[name].params, rows)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        if together[name].pad is None:
            np.testing.assert_allclose(program(together[name].params, rows), expected, rtol=1e-5, atol=1e-5)
    assert len(traced) == 1
    assert not np.allclose(program(together["wide"].params, rows), expected, rtol=0.1)


@pytest.mark.slow
def test_a_run_is_rewarded_by_a_separate_classifier(workdir):
    text = "from jaxft.rl.reward_models import ModelReward\n\njudge = ModelReward('judge', max_length=60)\n"
    (workdir.folder / "judged.py").write_text(text)
    argv = ["steps=2", "rewards=judged.py:judge", "batch=4", "group=2", "save=100"]
    assert workdir.run("name=judged", *argv) == 0, workdir.err()
    lines = [line for line in workdir.metrics("judged") if "reward" in line]
    assert all(np.isfinite(line["rewards/judge/mean"]) and line["rewards/judge/std"] > 0 for line in lines)
    assert any(entry["rewards"]["judge"] is not None for entry in rl_workdir.table(workdir, "judged"))
    record = json.loads((workdir.runs("judged") / "config.json").read_text())
    assert record["reward_judge_fingerprint"]


def test_a_reward_model_is_found_by_what_its_folder_has(workdir, tmp_path):
    model = pretrained.model_for(str(workdir.folder / "base"))
    further, reward = reward_models.find_reward_model(str(workdir.folder / "judge"), model)
    assert not further and isinstance(reward, ModelReward) and reward.name == "judge"
    with pytest.raises(ValueError, match="expected a sequence classifier"):
        reward_models.find_reward_model(str(workdir.folder / "base"), model)
    further, reward = reward_models.find_reward_model(str(tmp_path / "to come"), model)
    assert further.keys() == {"reward"} and not further["reward"].trained and reward == HeadReward()
    frozen = trainable_params.partition_params(with_heads(model, further), Adapter(rank=2), None)
    with pytest.raises(
        FileNotFoundError, match=r"to come: no such folder .* on the hub is org/name@revision"
    ):
        initial_params.init_all_but_base(
            frozen.model, one_device(), 0, HeadSettings(Adapter(rank=2)), scorers=further
        )


SCORE = """
import sys
import jax
from jaxft.distributed import sharding
from jaxft.rl import reward_models
from jaxft.weights import pretrained
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.dataset_rows import Row
prompts = [prompt_of(Row("r", {"prompt": text})) for text in ("what is 1?", "so")]
mesh = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])
for ref in sys.argv[2:]:
    _, judge = reward_models.find_reward_model(ref, pretrained.model_for(sys.argv[1]), longest=64)
    with jax.set_mesh(mesh):
        scores = judge.load(mesh)(prompts, ["it is 1", "why"]).tolist()
    print(judge.name, judge.fingerprint(), scores)
"""


@pytest.mark.slow
def test_a_classifier_on_the_hub_scores_as_its_folder_does(workdir, tmp_path):
    judge = workdir.folder / "judge"
    with hub_server.serve(judge, "org/judge") as (endpoint, requests):
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path)}
        env["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
        command = [sys.executable, "-c", SCORE, str(workdir.folder / "base"), str(judge), "org/judge@v1"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=240)
    here, there = (line.split(maxsplit=2) for line in done.stdout.splitlines() if "judge" in line)
    assert here[2] == there[2] and there[0] == "judge@v1"
    assert any("model.safetensors" in path for path in requests)


def test_a_classifier_scores_alike_on_a_mesh(workdir):
    prompts, completions, scores = ["what is 1?", "why?", "so"], ["it is 1", "because", "so " * 9], []
    for shape, count in ((sharding.MeshShape(), 1), (sharding.MeshShape(data=2, fsdp=2, tensor=2), 8)):
        mesh = sharding.make_mesh(shape, jax.devices()[:count])
        folder = workdir.folder / "judge"
        scores.append(score_texts(folder, prompts, completions, mesh, dtype=jnp.float32, max_length=128))
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_a_critic_with_its_own_base_starts_from_its_files_and_shares_nothing(workdir, kind):
    base = str(workdir.folder / "base")
    folder = base if kind == "language model" else str(workdir.folder / "judge")
    policy, settings = pretrained.model_for(base, dtype=jnp.float32), {"critic": HeadSettings(weights=folder)}
    model = with_heads(policy, settings)
    patterns = trainable_params.trainable_patterns(model, None, None, settings)
    t, mesh = trainable_params.partition_params(model, None, patterns), one_device()
    with jax.set_mesh(mesh):
        critic = initial_params.init_all_but_base(t.model, mesh, 0, HeadSettings(), base, settings)["critic"]
    loaded = None
    if kind == "classifier":
        loaded = reward_models.load_reward_model(folder, mesh, dtype=jnp.float32)
    whole = view({"base": None, "critic": critic}, "critic")
    assert whole["base"] is critic["base"] and "head" not in critic["base"]
    assert critic["score"].shape == (64, 1)
    expected = loaded.params["base"] if loaded else pretrained.load_frozen(folder, policy, mesh)
    jax.tree.map(
        np.testing.assert_array_equal, critic["base"], {name: expected[name] for name in critic["base"]}
    )
    if loaded:
        np.testing.assert_array_equal(critic["score"], loaded.params["score"])


def test_a_critic_with_its_own_base_is_trained_in_full():
    with pytest.raises(ValueError, match="weights=base trains a full model"):
        HeadSettings(weights="base", trained=False)


@pytest.mark.slow
def test_ppo_with_a_separate_critic_learns_values(workdir):
    argv = ["passes=2", "beta=0.0", "batch=16", "group=1", "lr=2e-3", "ppo=true", "full_critic=true"]
    argv += ["max_new=12", "save=4", "rewards=config.py:ascii", "scale=true", "steps=8"]
    assert workdir.run("name=own", *argv) == 0, workdir.err()
    lines = [line for line in workdir.metrics("own") if "loss/value_avg" in line]
    assert lines[-1]["loss/value_avg"] < lines[0]["loss/value_avg"]


@pytest.mark.slow
def test_scale_divides_scores_by_the_deviation_of_all_so_far_and_metrics_have_them_before(workdir):
    argv = ["passes=1", "beta=0.0", "batch=8", "group=1", "ppo=true", "max_new=12", "steps=3", "lr=1e-9"]
    argv += ["rewards=config.py:ascii"]
    assert workdir.run("name=plain", *argv) == 0, workdir.err()
    assert workdir.run("name=scaled", *argv, "scale=true") == 0, workdir.err()
    plain, scaled = (
        [line for line in workdir.metrics(name) if "loss/value_avg" in line] for name in ("plain", "scaled")
    )
    table, moments = rl_workdir.table(workdir, "scaled"), np.zeros(3)
    for step, (one, other) in enumerate(zip(plain, scaled, strict=True), 1):
        scores = np.array([[entry["reward"] for entry in table if entry["step"] == step]])
        moments = update_moments(moments, scores)
        assert one["reward"] == other["reward"] == pytest.approx(scores.mean())
        expected = scale_scores(scores, moments).mean()
        assert other["objective/rlhf_reward"] == pytest.approx(expected, rel=1e-5)
        assert one["objective/rlhf_reward"] == pytest.approx(scores.mean(), rel=1e-5)


@pytest.mark.slow
def test_the_model_card_has_sampled_completions_with_rewards_and_curves(workdir):
    argv = ["steps=3", "passes=1", "batch=4", "group=2", "save=100", "lr=1e-3"]
    assert workdir.run("name=card", *argv, PICTURES="1") == 0, workdir.err()
    card = (workdir.runs("card") / "README.md").read_text()
    assert "| step | prompt | completion | letters | reward |" in card and "![Curves](curves.png)" in card
    assert card.count("\n| 1 | what is") == 5 and card.count("\n| 3 | what is") == 5
    assert (workdir.runs("card") / "curves.png").read_bytes()[:4] == b"\x89PNG"
    data = json.loads((workdir.runs("card") / "data.json").read_text())
    assert "what is" in "".join(text for text, _ in data["examples"][0]["parts"][0]["pieces"])
