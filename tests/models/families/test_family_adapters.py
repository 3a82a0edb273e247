"""Adapters of every family: ours in PEFT, PEFT's here, merged. Rows that are not QUICK are slow."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import FAMILIES, both, logits_of, params_of, random_ids, rows, torch_model

from jaxft.models.adapted import adapted
from jaxft.nn.adapters.lora import Adapter, target_paths
from jaxft.nn.param_spec import init_params
from jaxft.nn.tree import paths
from jaxft.weights.edit.merged_weights import merge_params
from jaxft.weights.peft import peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

QUICK = ("phi3 with a window",)
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
IDS = random_ids(2, 40)


def fresh_torch(name):
    """A copy of the row's transformers model, which peft may change."""
    return copy.deepcopy(torch_model(name))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS).long()).logits.numpy()


def our_logits(model, params, adapter, settings):
    """Logits on IDS with the adapter attached."""
    return logits_of(adapted(model, settings), {"base": params, "adapter": adapter}, rows(IDS))


def trained(model, settings):
    """A random adapter whose b is not zero."""
    fresh = init_params(adapted(model, settings).specs["adapter"], jax.random.key(0), jnp.float32)

    def moved(path, x):
        key = jax.random.fold_in(jax.random.key(1), len(str(path)))
        return x if path[-1].key == "scale" else x + 0.1 * jax.random.normal(key, x.shape)

    return jax.tree_util.tree_map_with_path(moved, fresh)


def linear_modules(model):
    """Names of the linear layers inside the blocks of a transformers model."""
    return {
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name
    }


@every_family
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("with_head", [False, True], ids=["all-linear", "head"])
def test_our_adapter_has_the_same_logits_in_peft_and_the_same_merged_weights(name, with_head, tmp_path):
    _, model, params = both(name)
    targets = tuple(p.rsplit("/", 1)[-1] for p in target_paths(model.specs, "all-linear"))
    settings = Adapter(rank=3, alpha=6.0, targets=(*targets, "head") if with_head else "all-linear")
    adapter = trained(model, settings)
    expected = our_logits(model, params, adapter, settings)
    assert np.abs(expected - logits_of(model, params, rows(IDS))).max() > 0.1
    peft_write.save_adapter(tmp_path, adapter, settings, model, "org/base")

    theirs = peft.PeftModel.from_pretrained(fresh_torch(name), str(tmp_path)).eval()
    np.testing.assert_allclose(torch_logits(theirs), expected, atol=1e-4)
    again, _ = peft_read.read_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    if not with_head:
        merged = paths(merge_params(params, adapter, np.float32))
        state = theirs.merge_and_unload().state_dict()
        for path, value in paths(params_of(state, model)).items():
            np.testing.assert_allclose(
                np.stack([merged[path][i] for i in range(value.shape[0])]), value, atol=1e-5, err_msg=path
            )


@every_family
def test_pefts_all_linear_adapter_has_the_same_logits_here_and_written_by_us(name, tmp_path):
    _, model, params = both(name)
    torch.manual_seed(3)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")
    theirs = peft.get_peft_model(fresh_torch(name), settings).eval()
    for path, p in theirs.named_parameters():
        if "lora_" in path:
            torch.nn.init.normal_(p, std=0.05)
    theirs.save_pretrained(str(tmp_path / "in"))
    expected = torch_logits(theirs)
    assert np.abs(expected - logits_of(model, params, rows(IDS))).max() > 0.1

    adapter, read = peft_read.read_adapter(tmp_path / "in", model)
    assert {p.rsplit("/", 1)[0] for p in paths(adapter)} == set(target_paths(model.specs, "all-linear"))
    count = sum(pair.shape[0] for path, pair in paths(adapter).items() if path.endswith("/scale"))
    assert count == len(linear_modules(torch_model(name)))
    np.testing.assert_allclose(our_logits(model, params, adapter, read), expected, atol=1e-4)
    peft_write.save_adapter(tmp_path / "out", adapter, read, model, "org/base")
    again = peft.PeftModel.from_pretrained(fresh_torch(name), str(tmp_path / "out")).eval()
    np.testing.assert_allclose(torch_logits(again), expected, atol=1e-4)
