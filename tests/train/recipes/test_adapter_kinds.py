"""Each kind of adapter in whole runs: trained, read again, in peft, merged, on a quantised base, on a mesh,
in a sweep, resumed; its step with each objective. Most are slow; tests/README.md has the table.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading_process import one_device
from prepared import finished_run, prepare, working_directory
from safetensors.numpy import load_file
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder
from tiny_pairs import make_rows
from tiny_run import write_place, write_rows

from jaxft.distributed import sharding
from jaxft.models.adapted import HeadSettings, adapted, with_scalar_head
from jaxft.nn import tree
from jaxft.nn.quant import Quant
from jaxft.objectives.sft import sft
from jaxft.runs.metrics_log import read_entries
from jaxft.runs.settings.config import load_config, recipe_knobs, resolve_config
from jaxft.train import loop
from jaxft.train.export import export
from jaxft.train.programs import abstract
from jaxft.train.sweep import Sweep
from jaxft.weights import initial_params, pretrained
from jaxft.weights.peft import peft_read

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_e"
)
KINDS = {
    "LoRA": [],
    "rsLoRA": ["adapter.rslora=true"],
    "DoRA": ["adapter.dora=true"],
    "PiSSA": ["adapter.init=pissa"],
    "OLoRA": ["adapter.init=olora"],
    "EVA": ["adapter.init=eva", "adapter.eva_tokens=600"],
    "LoftQ": ["adapter.init=loftq", "quant=nf4"],
    "QERA": ["adapter.init=qera", "quant=nf4", "quant.calibrate=run"],
    "LoRA+": ["optim.lora_plus=16"],
    "patterns": ["adapter.rank_pattern=q_proj:2,layers.1.mlp.up_proj:6", "adapter.alpha_pattern=v_proj:3"],
    "some layers": [
        "adapter.layers_to_transform=0,2",
        "adapter.exclude_modules=k_proj,layers.2.mlp.up_proj",
    ],
    "bias": ["model=biased", "adapter.bias=all"],
    "modules_to_save": ["adapter.modules_to_save=lm_head,embed_tokens,norm"],
    "embeddings": ["adapter.targets=q_proj,v_proj,embed_tokens"],
    "tokens": ["adapter.targets=", "adapter.trainable_token_indices=64,72,83,257"],
    "tokens and pairs": ["adapter.trainable_token_indices=64,72,83,257"],
    "tied head": ["model=tied", "adapter.targets=q_proj,lm_head"],
}
RESIDUAL = ("PiSSA", "OLoRA", "LoftQ", "QERA")  # whose exported adapter is for the base in its own precision
QUANTISED = [kind for kind, argv in KINDS.items() if "quant=nf4" in argv]
COMMON = ["steps=2", "samples=0", "lr=0.02", "optim.warmup=0", "optim.schedule=constant"]
ALL = [pytest.param(kind, marks=() if kind == "EVA" else pytest.mark.slow) for kind in KINDS]
every_kind = pytest.mark.parametrize("kind", ALL)
every_kind_slowly = pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) for k in KINDS])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    write_place(folder)
    write_folder(folder / "tied", tiny_torch(tie_word_embeddings=True))
    biased = tiny_torch(attention_bias=True)
    for name, p in biased.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    write_folder(folder / "biased", biased)
    return Place(folder)


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(place.folder / "cache"))


class Place:
    """A working directory and the runs in it, each of which is trained once."""

    def __init__(self, folder):
        self.folder = folder
        self.finished = functools.cache(self._finished)

    def _finished(self, kind, name, *argv, devices=1):
        """The folder of a finished run of a kind."""
        settings = [*COMMON, *with_block(KINDS[kind], *argv), f"name={name}"]
        return finished_run(self.folder, "config.py", *settings, devices=devices)

    def base(self, kind):
        return next((text.removeprefix("model=") for text in KINDS[kind] if "model=" in text), "base")


def with_block(*argv):
    """Overrides, with a block that divides the widths of the tiny model if they quantise it."""
    flat = [text for part in argv for text in ([part] if isinstance(part, str) else part)]
    return [*flat, *(["quant.block=16"] if "quant=nf4" in flat else [])]


def losses(folder):
    return [entry["loss"] for entry in read_entries(folder / "metrics.jsonl") if "loss" in entry]


def held_out_losses(folder):
    entries = read_entries(folder / "metrics.jsonl")
    return [entry["eval_loss"] for entry in entries if "eval_loss" in entry]


def loss_of(place, kind, params, model, *argv):
    """The loss on the run's held-out rows."""
    job = prepare(place.folder, *COMMON, *with_block(KINDS[kind], *argv), "name=rows")
    objective, found = sft(model), []
    for batch in job.sources[0].held_out:
        found.append(objective(params, jax.tree.map(lambda x: x[0], batch), None, {})[1]["loss"])
    return float(sum(x.total for x in found) / sum(x.weight for x in found))


def read_back(place, kind, folder, quant=None):
    """(model with the adapter of a run, parameters on one device, the base's model)."""
    ref = str(place.folder / place.base(kind))
    model = pretrained.model_for(ref, dtype=jnp.float32)
    adapter, settings = peft_read.read_adapter(folder / "adapter", model)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    base = pretrained.load_frozen(ref, model, mesh, quant)
    return adapted(model, settings), {"base": base, "adapter": adapter}, settings


def torch_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder)).eval()


@pytest.mark.slow
def test_a_run_with_eva_says_what_it_read_and_has_its_ranks_in_the_adapters_config(place, capsys):
    run = place.finished("EVA", "EVA-one")  # here for the first time
    lines = [line for line in capsys.readouterr().out.splitlines() if "adapter.init=eva: " in line]
    assert len(lines) == 2 and "reading the inputs of layers/" in lines[0] and "ranks from " in lines[1]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    ranks = [x.shape[0] for name, x in tensors.items() if "lora_A" in name]
    assert sum(ranks) == 21 * 4 and max(ranks) <= 8
    assert config["rank_pattern"] and config["alpha_pattern"] and len(set(ranks)) > 1


@every_kind
def test_a_run_learns_and_its_adapter_is_the_same_read_again_in_peft_and_merged(place, tmp_path, kind):
    run = place.finished(kind, f"{kind}-one")
    model, params, settings = read_back(place, kind, run)
    before, after = held_out_losses(run)
    assert after < before and not list(run.glob("**/*.part"))
    if kind not in QUANTISED:
        assert loss_of(place, kind, params, model) == pytest.approx(after, rel=1e-5)
    tokens, ref = some_tokens(), place.folder / place.base(kind)
    expected = our_logits(model, params, tokens)
    base = pretrained.model_for(str(ref), dtype=jnp.float32)
    assert np.abs(expected - our_logits(base, params["base"], tokens)).max() > 1e-2
    theirs = peft.PeftModel.from_pretrained(torch_model(ref), str(run / "adapter")).eval()
    np.testing.assert_allclose(torch_logits(theirs, tokens), expected, atol=1e-4)
    source = export.ExportSource(
        str(ref), base, pretrained.load_tokenizer(str(ref)), params["adapter"],
        token_ids=settings.trainable_token_indices,
    )  # fmt: skip
    export.export_model(tmp_path / "merged", source, "float32")
    np.testing.assert_allclose(torch_logits(torch_model(tmp_path / "merged"), tokens), expected, atol=1e-4)


@every_kind_slowly
def test_on_a_quantised_base_the_adapter_that_is_read_has_the_loss_of_the_run(place, kind):
    run = place.finished(kind, f"{kind}-nf4", *([] if kind in QUANTISED else ["quant=nf4"]))
    before, after = held_out_losses(run)
    assert after < before
    if kind in RESIDUAL:  # for the base in its own precision, see test_reference_logprobs.py
        return
    model, params, _ = read_back(place, kind, run, Quant("nf4", block=16))
    assert loss_of(place, kind, params, model, "quant=nf4") == pytest.approx(after, rel=1e-5)


@every_kind_slowly
def test_a_mesh_has_the_losses_of_one_device(place, kind):
    one = place.finished(kind, f"{kind}-one")
    sizes = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    many = place.finished(kind, f"{kind}-mesh", *sizes, devices=8)
    assert losses(many) == pytest.approx(losses(one), rel=1e-4)
    assert held_out_losses(many) == pytest.approx(held_out_losses(one), rel=1e-3)


@every_kind_slowly
def test_a_member_of_a_sweep_has_the_losses_of_its_run_alone(place, kind):
    alone = place.finished(kind, f"{kind}-one")
    runs = {}
    with working_directory(place.folder):
        for lr in ("0.02", "0.01"):
            others = [text for text in COMMON if not text.startswith("lr=")]
            argv = [*others, *with_block(KINDS[kind]), f"lr={lr}", f"name={kind}-sweep/{lr}"]
            runs[lr] = load_config("config.py", argv)
        assert loop.run(Sweep(f"{kind}-sweep", runs), root=Path("runs")) == 0
    member = place.folder / "runs" / f"{kind}-sweep" / "0.02"
    assert losses(member) == pytest.approx(losses(alone), rel=1e-4)
    assert held_out_losses(member) == pytest.approx(held_out_losses(alone), rel=1e-3)


@every_kind_slowly
def test_a_run_that_is_resumed_is_the_same_bit_for_bit(place, kind):
    straight = place.finished(kind, f"{kind}-one")
    folder = f"{kind}-resumed"
    with working_directory(place.folder):
        for steps in (1, 2):
            argv = [*COMMON[1:], *with_block(KINDS[kind]), f"steps={steps}", f"name={folder}"]
            settings = resolve_config("config.py", argv)
            assert loop.run(settings.value, settings.describe(), Path("runs")) == 0
    found = place.folder / "runs" / folder
    assert losses(found) == losses(straight)
    one, two = (load_file(x / "adapter" / "adapter_model.safetensors") for x in (found, straight))
    assert one.keys() == two.keys()
    for name, value in two.items():
        np.testing.assert_array_equal(one[name], value, err_msg=name)


# Each kind with each objective: the programs build, or one line says why not.

RECIPES = ("sft", "dpo", "kto", "reward", "grpo", "ppo", "online_dpo")
# Knobs, of which each recipe gets those that it has.
REWARD = "jaxft.rl.rewards:json_match"
SIZES = {"max_length": "64", "max_prompt": "64", "max_new": "8", "reward": REWARD, "rewards": REWARD}
SCALAR_HEAD = "includes the language model head, but this model has a scalar head"
REFUSED = {
    ("modules_to_save", "reward"): SCALAR_HEAD,
    ("tied head", "reward"): SCALAR_HEAD,
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_each_objective_is_traced_for_each_kind_or_one_line_says_why_not(
    place, monkeypatch, kind, recipe
):
    path = str(Path(__file__).resolve().parents[3] / "configs" / f"{recipe}.py")
    monkeypatch.chdir(place.folder)
    base = [] if any("model=" in text for text in KINDS[kind]) else ["model=base"]
    knobs = [f"{name}={value}" for name, value in SIZES.items() if name in recipe_knobs(path)]
    knobs += ["critic=fresh"] if recipe == "ppo" else []
    argv = [*base, *with_block(KINDS[kind]), *knobs, "general=none", "dtype=float32"]

    def build():
        run = load_config(path, argv)
        programs, batch = abstract(run, jax.devices()[:1])
        with jax.set_mesh(programs.mesh):
            return jax.eval_shape(programs.train_step, programs.state, programs.frozen, batch)[1]

    words = REFUSED.get((kind, recipe))
    if words is None:
        assert {"loss", "grad_norm"} <= build().keys()
        return
    with pytest.raises(ValueError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


# Kinds that train other parameters than pairs of all layers, with losses on pairs and on own completions.
TRAINED = ("DoRA", "modules_to_save", "embeddings", "tokens and pairs", "some layers", "bias")
FROM_ROWS = ("EVA", "QERA")  # which start from inputs of the layers, in runs that sample from prompts
LENGTH = "def length(prompt, completion, row):\n    return float(len(set(completion)))\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, recipe",
    [(kind, name) for kind in TRAINED + FROM_ROWS for name in ("dpo", "reward", "grpo", "ppo")]
    + [(kind, "ppo") for kind in RESIDUAL if kind not in FROM_ROWS],
)
def test_other_objectives_train_every_part_of_an_adapter_in_two_steps_of_a_run(place, kind, recipe):
    if (kind, recipe) in REFUSED:
        return
    write_rows(place.folder / "pairs.jsonl", make_rows(20))
    (place.folder / "own.py").write_text(LENGTH)
    prompts = ["data=rows.jsonl", "group=4", "max_prompt=48", "max_new=6"]
    knobs = {
        "grpo": [*prompts, "rewards=own.py:length", "general=none"],
        "ppo": [*prompts, "reward=own.py:length", "critic=fresh", "general=none"],
        "dpo": ["data=pairs.jsonl", "max_length=64", "batch=4", "general=none"],
        "reward": ["data=pairs.jsonl", "max_length=64", "batch=4"],
    }[recipe]
    knobs += ["dtype=float32", "held_out=none", "loop.steps=2", "loop.eval_every=none", "rank=4"]
    model = [] if any("model=" in text for text in KINDS[kind]) else ["model=base"]
    settings = [text.replace("calibrate=run", "calibrate=rows.jsonl") for text in with_block(KINDS[kind])]
    argv = [*model, *settings, *knobs, "samples=0", f"name={kind}-{recipe}"]
    path = str(Path(__file__).resolve().parents[3] / "configs" / f"{recipe}.py")
    with working_directory(place.folder):
        run = load_config(path, argv)
        assert loop.run(run, root=Path("runs")) == 0
    folder = place.folder / "runs" / f"{kind}-{recipe}"
    assert np.isfinite(losses(folder)).all()
    if kind in FROM_ROWS + RESIDUAL:
        return
    model = pretrained.model_for(str(place.folder / place.base(kind)), dtype=jnp.float32)
    if recipe == "reward":
        model = with_scalar_head(model)
    found = tree.paths(peft_read.read_parts(folder / "adapter", model)[0]["adapter"])
    head = HeadSettings(run.adapter)
    whole = adapted(model, run.adapter)
    fresh = initial_params.init_all_but_base(
        whole, one_device(), run.seed, head, str(place.folder / place.base(kind))
    )
    for name, before in tree.paths(fresh["adapter"]).items():
        assert name.endswith("/scale") or np.any(found[name] != before), name
