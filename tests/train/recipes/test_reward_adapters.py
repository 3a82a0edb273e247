"""Reward models whose adapter trains whole modules, rows of tokens or the table, in whole runs: trained, read
again, in peft, merged, on a quantised base, on a mesh, in a sweep, resumed; as PPO's reward model and critic.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_place
from loading_process import one_device
from prepared import finished_run, prepare, working_directory
from reward_folders import torch_score
from safetensors.numpy import load_file
from tiny_llama import some_tokens, tiny_torch, write_folder

from jaxft.nn.quant import Quant
from jaxft.objectives.reward_model import reward
from jaxft.rl.reward_models import load_reward_model
from jaxft.runs.loaded_weights import NamedWeights
from jaxft.runs.metrics_log import read_entries
from jaxft.runs.settings.config import load_config
from jaxft.train import loop
from jaxft.train.export import export
from jaxft.train.sweep import Sweep

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_e"),
]
TOKENS = "adapter.trainable_token_indices=68,82,88,257"  # e, s, y and the end
KINDS = {
    "modules": ["adapter.modules_to_save=score,embed_tokens,norm"],
    "modules alone": ["adapter.targets=", "adapter.modules_to_save=embed_tokens,mlp"],
    "tokens": ["model=tied", "adapter.targets=", TOKENS],
    "tokens and pairs": [TOKENS],
    "embeddings": ["model=tied", "adapter.targets=q_proj,v_proj,embed_tokens"],
}
every_kind = pytest.mark.parametrize("kind", KINDS)
COMMON = ["steps=2", "lr=0.02"]
PPO = str(Path(__file__).resolve().parents[3] / "configs" / "ppo.py")
REWARD = "def length(prompt, completion, row):\n    return float(len(set(completion)))\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    reward_place.write_place(folder)
    write_folder(folder / "tied", tiny_torch(tie_word_embeddings=True))
    (folder / "own.py").write_text(REWARD)
    return Place(folder)


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(place.folder / "cache"))


class Place:
    """A working directory and the reward models in it, each of which is trained once."""

    def __init__(self, folder):
        self.folder = folder
        self.finished = functools.cache(self._finished)

    def _finished(self, kind, name, *argv, devices=1):
        return self.run("config.py", *COMMON, *KINDS[kind], *argv, f"name={kind}-{name}", devices=devices)

    def run(self, config, *argv, devices=1):
        """The folder of a finished run."""
        return finished_run(self.folder, config, *argv, devices=devices)

    def base(self, kind):
        return self.folder / ("tied" if "model=tied" in KINDS[kind] else "base")


def metric(folder, name):
    return [entry[name] for entry in read_entries(folder / "metrics.jsonl") if name in entry]


def held_out_loss(place, kind, loaded, *argv):
    """The loss of a reward model on the run's held-out pairs."""
    job = prepare(place.folder, *COMMON, *KINDS[kind], *argv, "name=rows")
    objective, found = reward(loaded.model, center=0.01), []
    for batch in job.sources[0].held_out:
        rows = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
        found.append(objective(loaded.params, rows, None, {})[1]["loss"])
    return float(sum(x.total for x in found) / sum(x.weight for x in found))


@every_kind
def test_a_run_learns_and_its_adapter_is_the_same_read_again_in_peft_and_merged(place, tmp_path, kind):
    run, base = place.finished(kind, "one"), str(place.base(kind))
    before, after = metric(run, "eval_loss")
    assert after < before
    loaded = load_reward_model(base, one_device(), run / "adapter", dtype=jnp.float32)
    assert held_out_loss(place, kind, loaded) == pytest.approx(after, rel=1e-5)
    tokens = some_tokens()
    tokens.ids[:, 3] = 82
    expected = np.asarray(loaded.score(loaded.params, tokens))
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(model, str(run / "adapter")).eval()
    np.testing.assert_allclose([torch_score(theirs, ids) for ids in tokens.ids], expected, atol=1e-4)
    source = export.named_source(NamedWeights(base, run / "adapter", None, []))
    export.export_model(tmp_path / "merged", source, "float32")
    whole = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged")).eval()
    np.testing.assert_allclose([torch_score(whole, ids) for ids in tokens.ids], expected, atol=1e-4)


@every_kind
def test_on_a_quantised_base_the_adapter_that_is_read_has_the_loss_of_the_run(place, kind):
    run = place.finished(kind, "nf4", "quant=nf4")
    before, after = metric(run, "eval_loss")
    assert after < before
    quant = Quant("nf4", 16)
    loaded = load_reward_model(str(place.base(kind)), one_device(), run / "adapter", quant, jnp.float32)
    assert held_out_loss(place, kind, loaded, "quant=nf4") == pytest.approx(after, rel=1e-5)


@every_kind
def test_a_mesh_has_the_losses_of_one_device(place, kind):
    """With SGD: Adam's first updates have the size of the learning rate however small a gradient is, so that
    the rounding of gradients near 0 would decide.
    """
    sgd, sizes = "optim.optimizer=optax:sgd", ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    one = place.finished(kind, "sgd", sgd)
    many = place.finished(kind, "mesh", sgd, *sizes, devices=8)
    assert metric(many, "loss") == pytest.approx(metric(one, "loss"), rel=1e-4)
    assert metric(many, "eval_loss") == pytest.approx(metric(one, "eval_loss"), rel=1e-3)


@every_kind
def test_a_member_of_a_sweep_has_the_losses_of_its_run_alone(place, kind):
    alone = place.finished(kind, "one")
    with working_directory(place.folder):
        runs = {
            lr: load_config("config.py", ["steps=2", *KINDS[kind], f"lr={lr}", f"name={kind}-sweep/{lr}"])
            for lr in ("0.02", "0.01")
        }
        assert loop.run(Sweep(f"{kind}-sweep", runs), root=Path("runs")) == 0
    member = place.folder / "runs" / f"{kind}-sweep" / "0.02"
    assert metric(member, "loss") == pytest.approx(metric(alone, "loss"), rel=1e-4)
    assert metric(member, "eval_loss") == pytest.approx(metric(alone, "eval_loss"), rel=1e-3)


def assert_same_adapter(one, other):
    found, expected = (load_file(x / "adapter" / "adapter_model.safetensors") for x in (one, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@every_kind
def test_a_run_that_is_resumed_is_the_same_bit_for_bit(place, kind):
    straight = place.finished(kind, "one")
    for steps in (1, 2):
        resumed = place.run("config.py", *KINDS[kind], "lr=0.02", f"steps={steps}", f"name={kind}-resumed")
    assert metric(resumed, "loss") == metric(straight, "loss")
    assert_same_adapter(resumed, straight)


# PPO whose reward model and critic replace other parameters than the policy

POLICY = {
    "pairs": [],
    "tokens": ["adapter.trainable_token_indices=64,72"],  # a, i
    "modules": ["adapter.modules_to_save=lm_head,embed_tokens"],
}


def ppo(place, kind, policy, *argv, devices=1):
    """The folder of a PPO run with the reward model of a kind, from which the critic starts too."""
    judge = place.finished(kind, "one")
    model = f"model={place.base(kind).name}"
    knobs = ["data=rows.jsonl", "group=4", "batch=4", "max_prompt=48", "max_new=6", "passes=1", "rank=4"]
    knobs += [
        "dtype=float32",
        "general=none",
        "held_out=none",
        "samples=0",
        "loop.eval_every=none",
        "lr=0.02",
    ]
    knobs += ["optim.warmup=0", "optim.schedule=constant"]
    given = ["critic=reward", f"reward={judge}", *knobs, *POLICY[policy], "loop.save_every=1", *argv]
    steps = [] if any(text.startswith("loop.steps=") for text in argv) else ["loop.steps=2"]
    return place.run(PPO, model, *given, *steps, devices=devices)


def leaves(folder, step):
    """Hashes of the trainable leaves in a checkpoint, by path."""
    manifest = json.loads((folder / "checkpoints" / str(step) / "manifest.json").read_text())
    return {path: leaf["shards"] for path, leaf in manifest["leaves"].items() if ".trainable." in path}


@pytest.mark.parametrize(
    "kind, policy",
    [
        ("modules", "tokens"),
        ("modules alone", "modules"),
        ("tokens", "tokens"),
        ("tokens and pairs", "pairs"),
        ("embeddings", "tokens"),
    ],
)
def test_ppo_has_other_replaced_parameters_in_each_model(place, kind, policy):
    folder = ppo(place, kind, policy, f"name=ppo-{kind}-{policy}")
    assert np.isfinite(metric(folder, "loss")).all() and len(metric(folder, "loss")) == 2
    before, after = leaves(folder, 1), leaves(folder, 2)
    ends = (".a", ".b", ".rows", ".weight", ".score")
    changing = [path for path in before if path.endswith(ends)]
    assert {"rows", "weight"} & {path.rpartition(".")[2] for path in changing} or kind == "embeddings"
    assert any("critic.adapter" in path for path in changing) and not any(
        ".reward." in path for path in before
    )
    assert not [path for path in changing if before[path] == after[path]]


@pytest.mark.parametrize("kind", ["modules", "tokens"])
def test_ppo_with_them_resumes_bit_for_bit(place, kind):
    straight = ppo(place, kind, "tokens", f"name=ppo-{kind}-tokens")
    for steps in (1, 2):
        resumed = ppo(place, kind, "tokens", f"loop.steps={steps}", f"name=ppo-{kind}-resumed")
    assert metric(resumed, "loss") == metric(straight, "loss")
    assert_same_adapter(resumed, straight)


@pytest.mark.parametrize("kind", ["modules", "tokens"])
def test_ppo_with_them_on_a_quantised_base_and_on_a_mesh(place, kind):
    one = ppo(place, kind, "tokens", "quant=nf4", "quant.block=16", f"name=ppo-{kind}-nf4")
    sizes = ["mesh.data=2", "mesh.fsdp=2"]
    many = ppo(
        place, kind, "tokens", "quant=nf4", "quant.block=16", *sizes, f"name=ppo-{kind}-mesh", devices=4
    )
    for name in ("loss", "loss/value_avg", "reward"):
        assert metric(many, name)[0] == pytest.approx(metric(one, name)[0], rel=1e-3, abs=1e-4)
