"""Adapters that start from the base's weights: PiSSA, OLoRA and LoftQ as PEFT has them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.distributed import sharding
from jaxft.models.adapted import adapted
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant, dequantize, is_qtensor
from jaxft.weights import pretrained
from jaxft.weights.edit import lora_start
from jaxft.weights.peft import peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
TOKENS = some_tokens()
TARGETS = ("q", "down")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("base"), tiny_torch())
    return str(folder), pretrained.model_for(str(folder), dtype=jnp.float32)


def torch_base(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world[0]).eval()


def begin(world, settings, quant=None):
    """(pairs, base, model) at step 0 on one device."""
    ref, model = world
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    stored = pretrained.frozen_model(model, quant, ref, settings)
    pairs = lora_start.start_pairs(ref, stored, settings)
    return pairs, pretrained.load_base(ref, stored, mesh, without=pairs.without), adapted(model, settings)


@pytest.mark.quick_cases("pissa")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_is_pefts_and_the_model_is_the_base(world, init, tmp_path):
    settings = Adapter(rank=4, alpha=8.0, targets=TARGETS, init=init)
    pairs, base, model = begin(world, settings)
    plain = torch_logits(torch_base(world), TOKENS)
    found = our_logits(model, {"base": base, "adapter": pairs.start}, TOKENS)
    np.testing.assert_allclose(found, plain, atol=5e-5)
    assert np.abs(our_logits(world[1], base, TOKENS) - plain).max() > 0.1

    config = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(torch_base(world), peft.LoraConfig(**config, init_lora_weights=init))
    layer = theirs.base_model.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        residual = layer.base_layer.weight.numpy()
        product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).numpy()
    ours = pairs.start["layers"]["mlp"]["down"]
    np.testing.assert_allclose((ours["a"][1] @ ours["b"][1]).T, product, atol=1e-5)
    np.testing.assert_allclose(base["layers"]["mlp"]["down"][1].T, residual, atol=1e-5)
    norms = np.linalg.norm(ours["a"][1], axis=0), torch.linalg.norm(layer.lora_A["default"].weight, dim=1)
    np.testing.assert_allclose(norms[0], norms[1].detach().numpy(), rtol=1e-4)

    after = tree.map_with_path(
        lambda path, x: x if "scale" in path else x + 0.03 * np.cos(np.arange(x.size)).reshape(x.shape),
        jax.tree.map(jnp.asarray, pairs.start),
    )  # fmt: skip
    expected = our_logits(model, {"base": base, "adapter": after}, TOKENS)
    assert np.abs(expected - plain).max() > 0.1
    for changed in settings, replace(settings, rslora=True, alpha=4.0):  # the same scale
        converted, written = lora_start.for_unchanged_base(after, pairs.start, changed)
        assert written.rank == 8 and written.scale == pytest.approx(settings.scale)
        peft_write.save_adapter(tmp_path, converted, written, world[1], world[0])
        again = peft.PeftModel.from_pretrained(torch_base(world), str(tmp_path)).eval()
        np.testing.assert_allclose(torch_logits(again, TOKENS), expected, atol=1e-4)


@pytest.mark.quick_cases("olora")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_has_the_same_logits_here_on_the_unchanged_base(world, init, tmp_path):
    config = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(torch_base(world), peft.LoraConfig(**config, init_lora_weights=init)).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs.peft_config["default"].init_lora_weights = init
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    expected = torch_logits(theirs, TOKENS)
    theirs.save_pretrained(
        str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    adapter, settings = peft_read.read_adapter(tmp_path / "out", world[1])
    assert settings.rank == 8
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    base = pretrained.load_frozen(*world, mesh)
    found = our_logits(adapted(world[1], settings), {"base": base, "adapter": adapter}, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - torch_logits(torch_base(world), TOKENS)).max() > 0.1


def errors(world, settings, quant):
    """Squared error of the stored weights with the adapter at step 0, and without one."""
    pairs, base, _ = begin(world, settings, quant)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    exact, plain = (pretrained.load_frozen(world[0], world[1], mesh, kind) for kind in (None, quant))
    out = np.zeros(2)
    for path in ("layers/attn/q", "layers/mlp/down"):
        w, q, own = (tree.paths(x, is_qtensor)[path] for x in (exact, plain, base))
        assert is_qtensor(own)
        pair = {name: tree.paths(pairs.start)[f"{path}/{name}"] for name in ("a", "b", "scale")}
        low = np.einsum("lir,lro->lio", pair["a"], pair["b"]) * pair["scale"][:, None, None]
        out += [np.sum((w - dequantize(own) - low) ** 2), np.sum((w - dequantize(q)) ** 2)]
    return out


def test_loftq_and_qpissa_reduce_the_error_of_quantisation(world):
    """One iteration of LoftQ removes exactly the largest singular values of the error; more remove more."""
    quant, settings = Quant("nf4", block=16), Adapter(rank=8, targets=TARGETS, init="loftq")
    alternating, plain = errors(world, settings, quant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_start, "LOFTQ_ITERATIONS", 1)
        once, _ = errors(world, settings, quant)
    pissa, _ = errors(world, replace(settings, init="pissa"), quant)
    assert alternating < once < plain and alternating < 0.7 * plain and pissa < plain
    singular = 0.0
    ref, model = world
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    exact, packed = (
        tree.paths(pretrained.load_frozen(ref, model, mesh, kind), is_qtensor) for kind in (None, quant)
    )
    for path in ("layers/attn/q", "layers/mlp/down"):
        values = np.linalg.svd(exact[path] - dequantize(packed[path]), compute_uv=False)
        singular += np.sum(values[:, 8:] ** 2)
    assert once == pytest.approx(singular, rel=1e-4)
