"""DoRA is PEFT's: logits both ways, gradients, dropout, merged weights; K adapters are K alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from safetensors.numpy import load_file, save_file
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder
from tiny_model import assert_close

from jaxft.models.adapted import adapted
from jaxft.nn.adapters.lora import ADAPTERS, Adapted, Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.matmul import dropout, linear
from jaxft.nn.param_spec import init_params
from jaxft.nn.quant import dequantize, quantize
from jaxft.weights import pretrained
from jaxft.weights.edit.lora_start import init_magnitudes
from jaxft.weights.edit.merged_weights import merge_on_read, merge_params
from jaxft.weights.peft import peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
TOKENS = some_tokens()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request, tmp_path_factory):
    """A folder with a base, its model and its parameters."""
    folder = tmp_path_factory.mktemp("base")
    write_folder(folder, tiny_torch(tie_word_embeddings=request.param))
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    return folder, model, load_on_host(str(folder), model, lambda path, array: jnp.asarray(array))


def torch_base(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(world[0])).eval()


def moved(adapter, size=0.1):
    """An adapter with other values in all leaves but scale."""

    def move(path, x):
        key = jax.random.fold_in(jax.random.key(1), len(str(path)))
        return x if path[-1].key == "scale" else x + size * jax.random.normal(key, x.shape)

    return jax.tree_util.tree_map_with_path(move, adapter)


def fresh(model, base, settings):
    return init_magnitudes(base, init_params(adapter_specs(model.specs, settings), jax.random.key(0)))


def logits(world, adapter, settings):
    return our_logits(adapted(world[1], settings), {"base": world[2], "adapter": adapter}, TOKENS)


def test_our_adapter_has_the_same_logits_in_peft_merged_and_read_again(world, tmp_path):
    folder, model, base = world
    settings = Adapter(rank=3, alpha=6.0, targets=("q", "down", "head"), dora=True)
    start = fresh(model, base, settings)
    plain = our_logits(model, base, TOKENS)
    np.testing.assert_allclose(logits(world, start, settings), plain, atol=2e-5)
    adapter = moved(start)
    expected = logits(world, adapter, settings)
    assert np.abs(expected - plain).max() > 0.1
    peft_write.save_adapter(tmp_path, adapter, settings, model, f"{folder}")
    theirs = peft.PeftModel.from_pretrained(torch_base(world), str(tmp_path)).eval()
    np.testing.assert_allclose(torch_logits(theirs, TOKENS), expected, atol=1e-4)
    again, found = peft_read.read_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    assert found.dora

    without_head = {name: x for name, x in adapter.items() if name != "head"}
    expected = theirs.merge_and_unload().state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    merged = merge_params(base, adapter, np.float32)["layers"]["mlp"]["down"][1]
    np.testing.assert_allclose(merged.T, expected, atol=1e-5)
    down = merge_on_read(pretrained.open_params(str(folder), model), model, without_head)["layers/mlp/down"]
    part = down.read(down.tensors[1], (slice(5, 50), slice(3, 9)))
    np.testing.assert_allclose(part.T, expected[3:9, 5:50], atol=1e-5)


def test_an_adapter_by_peft_has_the_same_logits_here_and_written_again(world, tmp_path):
    """Layer 1 has no adapter, so it has no magnitude either."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, use_dora=True, layers_to_transform=[0, 2],
        target_modules=["q_proj", "v_proj", "up_proj"],
    )  # fmt: skip
    theirs = peft.get_peft_model(torch_base(world), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data += 0.05 * torch.randn_like(p)
    theirs.save_pretrained(str(tmp_path / "in"))
    expected = torch_logits(theirs, TOKENS)
    assert np.abs(expected - our_logits(world[1], world[2], TOKENS)).max() > 0.1
    adapter, settings = peft_read.read_adapter(tmp_path / "in", world[1])
    np.testing.assert_allclose(logits(world, adapter, settings), expected, atol=1e-4)
    peft_write.save_adapter(tmp_path / "out", adapter, settings, world[1], "org/base")
    again = peft.PeftModel.from_pretrained(torch_base(world), str(tmp_path / "out")).eval()
    np.testing.assert_allclose(torch_logits(again, TOKENS), expected, atol=1e-4)

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = next(name for name in tensors if "magnitude" in name)
    for broken, message in ({}, "is missing"), ({name: tensors[name][:2]}, "this model needs"):
        rest = {key: x for key, x in tensors.items() if key != name}
        save_file({**rest, **broken}, tmp_path / "out" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=f"{name}.* {message}"):
            peft_read.read_adapter(tmp_path / "out", world[1])


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_gradients_and_dropout_of_a_layer_are_pefts(rate, x64):
    """On an NF4 base too: PEFT's layer has the dequantised weight."""
    rng = np.random.default_rng(0)
    base = quantize(rng.normal(size=(16, 6)), "nf4", 8)
    weight = np.asarray(dequantize(base))
    layer = torch.nn.Linear(16, 6, bias=False).double()
    layer.weight.data = torch.tensor(weight.T.copy())
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=rate, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(layer), config).double()
    theirs = {name.split(".")[3]: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(theirs) == {"lora_A", "lora_B", "lora_magnitude_vector"}
    np.testing.assert_allclose(
        theirs["lora_magnitude_vector"].detach().numpy(), np.linalg.norm(weight, axis=0), rtol=1e-6
    )
    for p in theirs.values():
        p.data += 0.3 * torch.tensor(rng.normal(size=p.shape))
    x, g, key = rng.normal(size=(2, 5, 16)), rng.normal(size=(2, 5, 6)), jax.random.key(3)
    dropped = np.asarray(dropout(jnp.asarray(x), rate, key))
    if rate:
        model.base_model.model[0].lora_dropout["default"] = _Fixed(torch.tensor(dropped))
    tx = torch.tensor(x, requires_grad=True)
    y = model.train()(tx)
    y.backward(torch.tensor(g))

    a, b, m = (jnp.asarray(p.detach().numpy()) for p in theirs.values())

    def ours(x, a, b, m):
        return linear(x, Adapted(base, a, b, jnp.float64(5 / 3), rate, m), key)

    found, vjp = jax.vjp(ours, jnp.asarray(x), a.T, b.T, m)
    assert_close(found, y.detach().numpy(), 1e-6)
    dx, da, db, dm = vjp(jnp.asarray(g))
    grads = [p.grad.numpy() for p in theirs.values()]
    assert_close((da.T, db.T, dm), tuple(grads), 1e-6)
    if not rate:
        assert_close(dx, tx.grad.numpy(), 1e-6)


class _Fixed(torch.nn.Module):
    """A dropout with a given result."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_several_adapters_are_each_alone(x64):
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=(8, 6))), jnp.asarray(rng.normal(size=(6, 5, 8)))
    sizes = ((3, 8, 2), (3, 2, 6), (3,), (3, 6))
    a, b, scale, m = (jnp.asarray(rng.normal(size=size)) for size in sizes)

    def alone(*params):
        rows = x.reshape(3, 2, 5, 8)
        return jnp.concatenate(
            [linear(rows[k], Adapted(w, a[k], b[k], scale[k], 0.0, m[k])) for k in range(3)
             for a, b, m in [params]]
        )  # fmt: skip

    def together(a, b, m):
        return linear(x, Adapted(w, a, b, scale, 0.0, m, over=(ADAPTERS,)))

    found, expected = (
        jax.value_and_grad(lambda p, f=f: jnp.sum(jnp.sin(f(*p))))((a, b, m)) for f in (together, alone)
    )
    assert_close(found, expected)
