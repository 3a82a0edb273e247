"""Unconverted PiSSA and OLoRA adapters of peft: their logits are those of its own from_pretrained."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.distributed import processes, sharding
from jaxft.models.adapted import HeadSettings, adapted
from jaxft.runs import loaded_weights
from jaxft.runs.loaded_weights import NamedWeights
from jaxft.train.export import export
from jaxft.weights import initial_params, pretrained
from jaxft.weights.peft import adapter_folders, peft_read, peft_write
from jaxft.weights.tensors import QuantisedTensor

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
TOKENS = some_tokens()
KINDS = {
    # The head's 4th and 5th singular values differ by 0.7 % of the first, where peft's float32 SVD is off by
    # 2e-5; the 3rd and 4th by 2.5 %.
    "PiSSA": dict(
        init_lora_weights="pissa", target_modules=["q_proj", "down_proj", "lm_head"],
        rank_pattern={"lm_head": 3},
    ),
    "OLoRA": dict(init_lora_weights="olora", target_modules=["q_proj", "down_proj"]),
    "ranks": dict(
        init_lora_weights="pissa", target_modules=["k_proj", "gate_proj", "embed_tokens"],
        rank_pattern={"gate_proj": 6, "layers.1.self_attn.k_proj": 2}, alpha_pattern={"k_proj": 3},
    ),
    "rsLoRA": dict(
        init_lora_weights="olora", target_modules=["v_proj", "up_proj"], use_rslora=True,
        rank_pattern={"up_proj": 3}, modules_to_save=["norm"],
    ),
    "DoRA": dict(init_lora_weights="pissa", target_modules=["v_proj", "up_proj"], use_dora=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_folder(
        tmp_path_factory.mktemp("base"), tiny_torch(tie_word_embeddings=False, num_hidden_layers=2)
    )
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    return str(folder), model, pretrained.load_frozen(str(folder), model, mesh)


def torch_base(world, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world[0], **options).eval()


def saved(base, folder, **config):
    """A changed adapter of peft's on `base`, saved without a conversion, and its wrapped model."""
    made = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **config})
    theirs = peft.get_peft_model(base, made).eval()
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    theirs.save_pretrained(str(folder))
    return theirs


@pytest.mark.quick_cases("PiSSA", "DoRA")
@pytest.mark.parametrize("kind", KINDS)
def test_an_unconverted_adapter_has_pefts_logits_on_the_unchanged_base(world, tmp_path, kind):
    trained = saved(torch_base(world), tmp_path / "in", **KINDS[kind])
    theirs = peft.PeftModel.from_pretrained(torch_base(world), str(tmp_path / "in")).eval()
    expected = torch_logits(theirs, TOKENS)
    np.testing.assert_allclose(torch_logits(trained, TOKENS), expected, atol=1e-4)
    ref, model, base = world
    files = pretrained.open_files(ref)
    pretrained.check_adapter_base(tmp_path / "in", ref)
    adapter, settings = peft_read.read_adapter(tmp_path / "in", model, files)
    assert settings.rank == 8 and settings.init == "default"
    assert peft_read.read_declared(tmp_path / "in", model) == (("adapter",), settings)
    found = our_logits(adapted(model, settings), {"base": base, "adapter": adapter}, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - our_logits(model, base, TOKENS)).max() > 0.1
    peft_write.save_adapter(tmp_path / "out", adapter, settings, model, ref)
    plain = peft.PeftModel.from_pretrained(torch_base(world), str(tmp_path / "out")).eval()
    assert plain.peft_config["default"].init_lora_weights is True
    np.testing.assert_allclose(torch_logits(plain, TOKENS), expected, atol=1e-4)


def test_on_a_16_bit_base_only_pefts_rounding_of_the_residual_differs(world, tmp_path):
    theirs = saved(torch_base(world, dtype=torch.bfloat16), tmp_path, **KINDS["PiSSA"])
    low = tmp_path / "bfloat16"
    torch_base(world, dtype=torch.bfloat16).save_pretrained(str(low))
    adapter, _ = peft_read.read_adapter(tmp_path, world[1], pretrained.open_files(str(low)))
    layer = theirs.base_model.model.model.layers[1].mlp.down_proj
    residual = layer.base_layer.weight.detach().float().numpy()
    product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().float().numpy()
    weight = pretrained.open_files(str(low)).read("model.layers.1.mlp.down_proj.weight").astype(np.float32)
    pair = adapter["layers"]["mlp"]["down"]
    ours = weight + pair["scale"][1] * (pair["a"][1] @ pair["b"][1]).T
    half_a_step = 2.0**-8 * np.abs(residual)
    assert np.all(np.abs(ours - residual - 2 * product) <= half_a_step + 1e-5)


def test_every_command_and_further_training_read_the_same_plain_pairs(world, tmp_path):
    ref, model, base = world
    saved(torch_base(world), tmp_path, **KINDS["OLoRA"])
    expected, settings = peft_read.read_adapter(tmp_path, model, pretrained.open_files(ref))
    config = tmp_path / "adapter_config.json"  # peft compares this name in lower case
    config.write_text(config.read_text().replace('"olora"', '"OLoRA"'))
    assert '"OLoRA"' in config.read_text()
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])

    def assert_same(found):
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    assert_same(adapter_folders.load_adapter(tmp_path, model, mesh, ref)[0])
    assert_same(loaded_weights.read_adapters({"a": tmp_path}, ref, model, base)["a"])
    assert_same(export.named_source(NamedWeights(ref, tmp_path, None, [])).adapter)
    assert adapter_folders.read_adapter_settings(str(tmp_path), model) == settings
    whole = adapted(model, settings)
    own = HeadSettings(settings, str(tmp_path))
    initial_params.check_starts(whole, own, ref)
    assert_same(initial_params.init_all_but_base(whole, mesh, 0, own, ref)["adapter"])
    with pytest.raises(ValueError, match="rank=8"):
        initial_params.check_starts(whole, replace(own, adapter=replace(settings, rank=4)), ref)


def test_what_cannot_be_read_is_one_line_with_the_way_that_works(world, tmp_path, monkeypatch):
    ref, model, _ = world
    saved(torch_base(world), tmp_path / "a", **KINDS["PiSSA"])
    config = tmp_path / "a" / "adapter_config.json"
    files = pretrained.open_files(ref)

    def assert_refused(*words, model=model, files=files, folder=tmp_path / "a"):
        with pytest.raises(ValueError) as caught:
            peft_read.read_adapter(folder, model, files)
        text = str(caught.value)
        assert "\n" not in text and all(
            word in text for word in (str(folder), "init_lora_weights", *words)
        ), text

    convert = "path_initial_model_for_weight_conversion"
    assert_refused("'pissa' needs the base's weights", convert, files=None)
    name = "model.layers.1.self_attn.q_proj.weight"

    def changed(**fields):
        return replace(files, tensors={**files.tensors, name: replace(files.tensors[name], **fields)})

    assert_refused(name, "use the base model of the adapter", files=changed(shape=(64, 32)))
    packed = QuantisedTensor("nf4", (64, 64), None, lambda index=(): np.zeros((64, 64)))
    assert_refused(name, "quantised (nf4)", "quant=nf4", files=changed(quantised=packed))
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "init_lora_weights": "pissa_niter_4"}))
    assert_refused("'pissa_niter_4'", convert)
    config.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "is_multi_process", lambda: True)
        assert_refused("one process", convert)
    tied = write_folder(tmp_path / "tied", tiny_torch(num_hidden_layers=2, tie_word_embeddings=True))
    saved(torch_base((str(tied),)), tmp_path / "b", **KINDS["PiSSA"])
    tied_files = pretrained.open_files(str(tied))
    of_tied = pretrained.model_for(str(tied), dtype=jnp.float32)
    assert_refused("tied", "merge_and_unload", model=of_tied, files=tied_files, folder=tmp_path / "b")
