"""Reward models and critics on a base that the policy's adapter changes (PiSSA, OLoRA, LoftQ): in PPO they
compute what they compute without that, and the reference is the policy at step 0 without a copy.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rollout_batches
from loading_process import one_device
from prepared import working_directory
from reward_folders import begun, saved
from tiny_llama import some_tokens, tiny_tokenizer, tiny_torch, write_folder
from tiny_pairs import make_rows
from tiny_run import write_rows

from jaxft.models import adapted
from jaxft.models.adapted import HeadSettings
from jaxft.nn import tree
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, Adapter, join_adapters
from jaxft.nn.quant import Quant
from jaxft.rl import reward_models
from jaxft.runs.metrics_log import read_entries
from jaxft.runs.settings.config import load_config
from jaxft.train import loop, trainable_params
from jaxft.train.export import export
from jaxft.train.programs import build, start
from jaxft.weights import pretrained
from jaxft.weights.edit import lora_start

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
PPO = str(CONFIGS / "ppo.py")
TARGETS = ("q", "down")
NF4 = Quant("nf4", block=16, targets="layers/attn/q|layers/mlp/down")
IN_NF4 = ["adapter.targets=q,down", "quant=nf4", "quant.block=16", f"quant.targets={NF4.targets}"]
BATCH = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else None),
    rollout_batches.laid([rollout_batches.random_groups(3, seed=seed) for seed in (1, 2)]),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/, and a reward model on it in reward/."""
    folder = tmp_path_factory.mktemp("initial")
    base = write_folder(folder / "base", tiny_torch())
    saved(*begun(base), base, folder / "reward")
    return folder


@pytest.fixture(scope="module")
def without(place):
    """PPO with a plain LoRA policy at step 0."""
    return Begun(place)


class Begun:
    """A run of configs/ppo.py at step 0, by default on one device."""

    def __init__(self, place, *argv, folder=None, critic=None, devices=1):
        knobs = {"model": place / "base", "reward": place / "reward", "critic": "fresh", "rank": 4}
        knobs |= {"max_prompt": 64, "max_new": 8, "dtype": "float32", "general": "none"}
        knobs |= dict(text.split("=", 1) for text in argv)
        run = load_config(PPO, [f"{name}={value}" for name, value in knobs.items()])
        self.run = run if critic is None else replace(run, heads={**run.heads, "critic": critic})
        self.programs = build(self.run, 10, jax.devices()[:devices])
        self.state, self.frozen = self.start(None, folder)
        self.params = tree.combine(self.state.trainable, self.frozen)
        self.model = self.programs.partition.model

    def start(self, restored, folder):
        with jax.set_mesh(self.programs.mesh):
            return start(self.run, self.programs, restored, folder=folder)

    def scores(self, params=None):
        """(log-probs of the policy, of the reference, values of the critic) at the read positions."""
        score = jax.jit(self.programs.objective.score)
        with jax.set_mesh(self.programs.mesh):
            return [np.asarray(x) for x in score(params or self.params, BATCH, self.state.aux)]

    def rewards(self):
        """Of the reward model for the rows of some_tokens."""
        return adapted.scores(self.params["reward"], self.hidden("reward")[:, -1])

    def hidden(self, name=None):
        """Of the policy, or of a model on its base."""
        params = self.params if name is None else adapted.view(self.params, name)
        return np.asarray(jax.jit(self.model.hidden)(params, some_tokens())[0])


def shaken(params):
    """An adapter after some training."""

    def moved(path, x):
        return x if path.endswith("/scale") else x + 0.05 * np.cos(np.arange(x.size)).reshape(x.shape)

    return tree.map_with_path(moved, params)


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_log_probs_values_and_rewards_at_step_0_are_those_without_it(place, without, init):
    run = Begun(place, f"adapter.init={init}")
    base = [tree.paths(x.frozen["base"])["layers/attn/q"] for x in (run, without)]
    assert np.abs(base[0] - base[1]).max() > 0.05
    for found, expected in zip(run.scores(), without.scores(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    adapter = place / "reward" / "adapter"
    alone = reward_models.load_reward_model(str(place / "base"), one_device(), adapter, dtype=jnp.float32)
    np.testing.assert_allclose(run.rewards(), alone.score(alone.params, some_tokens()), atol=1e-5)


@pytest.mark.slow
def test_log_probs_and_values_on_a_mesh_are_those_of_one_device(place, without):
    sizes = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    many = Begun(place, "adapter.init=pissa", *sizes, devices=8)
    for found, expected in zip(many.scores(), without.scores(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_the_reference_is_the_policy_at_step_0_without_a_copy_and_a_resumed_run_has_its_bits(
    place, tmp_path, monkeypatch
):
    run = Begun(place, "adapter.init=loftq", *IN_NF4, folder=tmp_path)
    logps, reference, values = run.scores()
    np.testing.assert_array_equal(reference, logps)
    assert "reference" not in run.state.aux and not jax.tree.leaves(run.state.trainable[INITIAL_ADAPTER])
    trained = {**run.params, "adapter": shaken(run.params["adapter"])}
    after = run.scores(trained)
    assert np.abs(after[0] - logps).max() > 0.01
    np.testing.assert_array_equal(after[1], reference)
    np.testing.assert_array_equal(after[2], values)
    np.testing.assert_allclose(run.hidden("critic"), run.hidden(), atol=1e-5)  # its own b is 0
    monkeypatch.setattr(lora_start, "start_pairs", None)  # which could differ on another machine
    _, again = run.start(run.state, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, run.frozen)
    np.testing.assert_array_equal(
        again[INITIAL_ADAPTER]["layers"]["attn"]["q"]["a"], run.params["adapter"]["layers"]["attn"]["q"]["a"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("init, quant", [("pissa", None), ("loftq", NF4)])
def test_a_reward_model_that_was_trained_so_scores_as_in_its_own_run(place, tmp_path, init, quant):
    ref, settings = str(place / "base"), Adapter(rank=4, alpha=8.0, init=init, targets=TARGETS)
    model = adapted.with_scalar_head(pretrained.model_for(ref, dtype=jnp.float32))
    parts = trainable_params.partition_params(model, settings, None, quant, ref)
    pairs = lora_start.start_pairs(ref, parts.stored, settings)
    base = pretrained.load_base(ref, parts.stored, one_device(), without=pairs.without)
    score = begun(ref)[1]["score"]
    whole = {"base": base, "adapter": shaken(jax.tree.map(jnp.asarray, pairs.start)), "score": score}
    expected = reward_models.score_rows(parts.model, whole, some_tokens())
    described = SimpleNamespace(adapter=settings, model=model, weights=ref)
    export.export_run(parts, whole, described, tiny_tokenizer(), tmp_path / "own", pairs.start)

    argv = [*(IN_NF4 if quant else IN_NF4[:1]), f"adapter.init={init}", f"reward={tmp_path / 'own'}"]
    run = Begun(place, *argv)
    assert run.run.adapter == settings and run.run.quant == quant
    assert run.run.heads["reward"].adapter.rank == 8  # of the exported adapter, for the unchanged base
    np.testing.assert_allclose(run.rewards(), expected, atol=1e-5)


@pytest.mark.slow
def test_ppo_trains_on_the_scores_of_a_loftq_reward_run_whose_settings_it_has(place, monkeypatch, capsys):
    monkeypatch.setenv("JAXFT_CACHE", str(place / "cache"))
    write_rows(place / "pairs.jsonl", make_rows(12))
    common = ["model=base", "data=pairs.jsonl", "held_out=none", "rank=4", "dtype=float32", "samples=0"]
    common += [*IN_NF4, "adapter.init=loftq", "loop.steps=2", "loop.eval_every=none"]
    prompts = ["group=4", "batch=4", "max_prompt=64", "max_new=6", "general=none"]
    lines = {}
    with working_directory(place):
        for name, argv in {
            "judge": ["batch=4", "max_length=96"],
            "same": [*prompts, "reward=runs/judge", "critic=reward"],
            "other": [*prompts, "reward=runs/judge", "critic=fresh", "adapter.init=pissa"],
        }.items():
            settings = {text.partition("=")[0]: text for text in [*common, *argv, f"name={name}"]}
            recipe = CONFIGS / ("reward.py" if name == "judge" else "ppo.py")
            assert loop.run(load_config(str(recipe), list(settings.values())), root=Path("runs")) == 0
            lines[name] = capsys.readouterr().out
        logged = read_entries(Path("runs/same/metrics.jsonl"))
    scores = [entry["rewards/reward/mean"] for entry in logged if "rewards/reward/mean" in entry]
    assert scores and np.isfinite(scores).all()
    assert "own precision" not in lines["same"] and "was trained on a base" not in lines["same"]
    assert "the merged model with scripts/export.py and use that" in lines["other"]


def test_a_dora_critic_of_other_modules_starts_as_the_policy(place):
    settings = Adapter(rank=2, targets=("q", "down"), layers_to_transform=(0,), dora=True)
    run = Begun(place, "adapter.init=pissa", "adapter.targets=v,q", critic=HeadSettings(settings))
    np.testing.assert_allclose(run.hidden("critic"), run.hidden(), atol=1e-5)
    for name in ("attn/q", "mlp/down"):
        magnitudes = tree.paths(run.params["critic"]["adapter"])[f"layers/{name}/magnitude"]
        assert np.all(magnitudes[0] > 0) and not np.any(magnitudes[1:])


def test_a_critic_with_a_base_of_its_own_has_no_part_of_the_policys(place):
    run = Begun(place, "adapter.init=pissa", "critic=full", "reward=jaxft.rl.rewards:json_match")
    assert INITIAL_ADAPTER not in run.frozen and "reference" in run.state.aux
    assert "adapter" not in adapted.view(run.params, "critic")


def test_no_pattern_trains_the_first_pairs(place):
    model = pretrained.model_for(str(place / "base"), dtype=jnp.float32)
    model = adapted.with_heads(model, {"critic": HeadSettings()})
    parts = trainable_params.partition_params(model, Adapter(rank=2, init="pissa"), ".*")
    trained = {path.partition("/")[0] for path in trainable_params.trainable_paths(parts)}
    assert INITIAL_ADAPTER in parts.specs and trained == {"base", "adapter", "critic"}


def test_joined_adapters_change_a_base_as_both_do():
    rng = np.random.default_rng(0)

    def pair(rank, scale):
        shapes = {"a": (2, 6, rank), "b": (2, rank, 5)}
        return {**{name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}, "scale": scale}

    def change(adapter, name):
        p = adapter["layers"][name]
        return np.einsum("l,lir,lro->lio", p["scale"], p["a"], p["b"])

    one = {"layers": {"q": pair(2, jnp.array([0.5, 2.0])), "norm": {"weight": jnp.ones(3)}}}
    other = {"layers": {"q": pair(3, jnp.array([1.5, -1.0])), "v": pair(1, jnp.ones(2))}}
    both = join_adapters(one, other)
    assert both["layers"].keys() == {"q", "v", "norm"} and both["layers"]["norm"] is one["layers"]["norm"]
    np.testing.assert_allclose(change(both, "q"), change(one, "q") + change(other, "q"), rtol=1e-5)
    np.testing.assert_array_equal(change(both, "v"), change(other, "v"))
    assert join_adapters(None, other) is other and join_adapters(one, None) is one
    replaced = {"layers": {"q": {"weight": jnp.ones((2, 6, 5))}}}
    assert join_adapters(replaced, other)["layers"]["q"] is replaced["layers"]["q"]
