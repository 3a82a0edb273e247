"""FP8 and compressed-tensors checkpoints: transformers' values, definitions, refusals, what jaxft writes."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from loading_process import assert_has_the_bits_of, mesh_of, one_device
from quantised_folders import COMPRESSED, SIZES, is_linear, write_compressed, write_fp8
from safetensors.torch import load_file, save_file
from scripts_in_process import call
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.matmul import multiplies_in_fp8
from jaxft.nn.quant import QTensor, Quant, dequantize
from jaxft.train import trainable_params
from jaxft.weights import pretrained

torch = pytest.importorskip("torch")


def stored(ref, dtype=jnp.float32, mesh=None, **settings):
    """(model, Partition, base) of a checkpoint, stored as its files store it."""
    model = pretrained.model_for(str(ref), dtype=dtype)
    t = trainable_params.partition_params(
        model, Adapter(rank=2), None, Quant("checkpoint", **settings), str(ref)
    )
    return model, t, pretrained.load_base(str(ref), t.stored, mesh or one_device())


def assert_stays_quantised(folder, expected, kind, block):
    model, t, base = stored(folder)
    files = pretrained.open_files(str(folder))
    assert set(files.quantised) == set(expected) and pretrained.storage_changes(str(folder), t.stored) == []
    for group in ("attn", "mlp"):
        for name, leaf in base["layers"][group].items():
            assert isinstance(leaf, QTensor) and (leaf.kind, leaf.block) == (kind, block)
            hf = model.weight_names[f"layers/{group}/{name}"][0]
            for i in range(model.config.layers):
                values = dequantize(jax.tree.map(lambda x, i=i: x[i], leaf)).T
                np.testing.assert_array_equal(values, expected[hf.format(i=i)])
                np.testing.assert_array_equal(files.read(hf.format(i=i)), expected[hf.format(i=i)])
    return model, base


def test_fine_grained_fp8_weights_have_transformers_values_and_stay_quantised(tmp_path):
    from transformers import AutoModelForCausalLM

    folder, expected = write_fp8(tmp_path / "fp8")
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, device_map="cpu")
    for name, value in expected.items():
        np.testing.assert_array_equal(theirs.get_parameter(name).detach().numpy(), value)
    model, base = assert_stays_quantised(folder, expected, "fp8", 32)
    target = torch_logits(theirs, some_tokens())
    np.testing.assert_allclose(our_logits(model, base, some_tokens()), target, atol=2e-4)


@pytest.mark.quick_cases("(1, 16)-16", "(128, 256)-None")
@pytest.mark.parametrize("block, kept", [((48, 40), 40), ((128, 256), None), ((1, 16), 16)], ids=str)
def test_blocks_that_do_not_divide_a_weight_or_cover_it(tmp_path, block, kept):
    folder, expected = write_fp8(tmp_path / "fp8", block)
    model, base = assert_stays_quantised(folder, expected, "fp8", kept)
    for name in ("1x8", "2x2x2"):
        if (name, kept) != ("2x2x2", 40):  # tensor=2 does not divide blocks of 40 inputs
            assert_has_the_bits_of(stored(folder, mesh=mesh_of(name))[2], base)


@pytest.mark.quick_cases("int4", "channel", "block")
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors_weights_have_the_values_of_their_definition(tmp_path, case):
    folder, expected = write_compressed(tmp_path / "packed", case)
    kind = case if case.startswith("int") else "fp8"
    model, base = assert_stays_quantised(
        folder, expected, kind, None if case in ("tensor", "channel", "int8") else 32
    )
    plain = load_on_host(str(folder), model, lambda path, x: jnp.asarray(x))
    target = our_logits(model, plain, some_tokens())
    np.testing.assert_allclose(our_logits(model, base, some_tokens()), target, atol=2e-3)


def test_scales_per_channel_are_multiplied_in_fp8_and_others_are_not(tmp_path):
    channel, block = (write_compressed(tmp_path / case, case)[0] for case in ("channel", "block"))
    leaf = stored(channel, fp8_matmul=True)[2]["layers"]["mlp"]["up"]
    assert multiplies_in_fp8(leaf) and not multiplies_in_fp8(replace(leaf, fp8_matmul=None))
    with pytest.raises(
        ValueError, match="quant.fp8_matmul=true, but the files have no FP8 weights with a scale per"
    ):
        stored(block, fp8_matmul=True)


REFUSED = {
    "static activations": (write_fp8, dict(activation_scheme="static"), "activation_scheme='static'"),
    "a block of one number": (
        write_fp8,
        dict(weight_block_size=[128]),
        r"weight_block_size .* \[128\], expected",
    ),
    "MXFP4": (
        write_compressed,
        dict(format="mxfp4-pack-quantized"),
        "format='mxfp4-pack-quantized', but jaxft",
    ),
    "NVFP4": (write_compressed, dict(format="nvfp4-pack-quantized"), "reads float-quantized, int-quantized"),
    "a cache": (write_compressed, dict(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme, whose scales"),
    "no groups": (write_compressed, dict(config_groups={}), "without weights in config_groups"),
    "4 bits": (
        write_compressed,
        dict(weights={"num_bits": 4}),
        "with num_bits=4, but jaxft reads num_bits=8",
    ),
    "zero points": (write_compressed, dict(weights={"symmetric": False}), "symmetric=False, but jaxft reads"),
    "act-order": (write_compressed, dict(weights={"actorder": "group"}), "actorder='group', but jaxft reads"),
    "a strategy": (
        write_compressed,
        dict(weights={"strategy": "attn_head"}),
        "strategy='attn_head', but jaxft",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_schemes_that_jaxft_does_not_read_are_one_line(tmp_path, case):
    write, settings, message = REFUSED[case]
    args = () if write is write_fp8 else ("channel",)
    folder, _ = write(tmp_path / "packed", *args, **settings)
    with pytest.raises(ValueError, match=message) as error:
        pretrained.open_files(str(folder))
    assert "\n" not in str(error.value)


def static(config):
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False


def two_groups(config):
    group = config["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = {**group, "weights": {**group["weights"], "strategy": "tensor"}}


@pytest.mark.parametrize(
    "change, message",
    [
        (static, "calibrated scales of activations"),
        (two_groups, "2 groups of layers whose weights have different formats"),
    ],
)
def test_groups_that_jaxft_does_not_read_are_one_line(tmp_path, change, message):
    folder, _ = write_compressed(tmp_path / "packed", "channel")
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        pretrained.open_files(str(folder))


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGED = {
    "a scale is missing": (lambda s: s.pop(f"{UP}_scale"), f"{UP} has no scale tensor"),
    "a weight is missing": (lambda s: s.pop(UP), f"{UP} is missing; download the model again"),
    "a plain weight": (
        lambda s: s.update({UP: s[UP].float()}),
        f"{UP} is float32.*expected a matrix of float8",
    ),
    "a scale of another shape": (
        lambda s: s.update({f"{UP}_scale": s[f"{UP}_scale"][1:]}),
        r"_scale has shape \(191, 1\), expected \(192, 1",
    ),
    "integer scales": (
        lambda s: s.update({f"{UP}_scale": s[f"{UP}_scale"].int()}),
        "the dtype of .*_scale is int32, but",
    ),
    "a scale of activations": (
        lambda s: s.update({UP.replace("weight", "input_scale"): torch.ones(1)}),
        "input_scale is a calibrated scale",
    ),
    "NaN": (lambda s: s[UP].view(torch.uint8)[0, 0].fill_(127), f"{UP}: .*NaN"),
    "an infinite scale": (
        lambda s: s[f"{UP}_scale"][0].fill_(float("inf")),
        f"{UP}: its quantisation array 'scale'",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_an_inconsistent_fp8_checkpoint_is_one_line(tmp_path, case):
    change, message = DAMAGED[case]
    folder, _ = write_compressed(tmp_path / "packed", "channel")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        stored(folder)
    assert "\n" not in str(error.value)


def test_an_fp8_model_is_written_as_compressed_tensors_and_read_back(tmp_path, monkeypatch, capsys):
    source, out = write_folder(tmp_path / "base", tiny_torch(**SIZES)), tmp_path / "packed"
    code, reported, err = call(
        monkeypatch, capsys, "quantize", "--model", source, "--out", out, "--kind", "fp8"
    )
    assert code == 0 and "compressed-tensors' layout" in reported, err
    state = load_file(out / "model.safetensors")
    exact = load_file(source / "model.safetensors")
    for name in [n for n in exact if is_linear(n)]:
        scale = state[f"{name}_scale"]
        assert state[name].dtype == torch.float8_e4m3fn and scale.shape == (len(exact[name]), 1)
        torch.testing.assert_close(scale, exact[name].float().abs().amax(1, keepdim=True) / 448)
        # by torch's cast; a quotient may round otherwise where a product with the inverse does not
        same = state[name].float() == (exact[name].float() / scale).to(torch.float8_e4m3fn).float()
        assert same.float().mean() > 0.999
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"] and config["format"] == "float-quantized"


def test_compressed_tensors_loads_what_jaxft_writes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source, out = write_folder(tmp_path / "base", tiny_torch(**SIZES)), tmp_path / "packed"
    assert call(monkeypatch, capsys, "quantize", "--model", source, "--out", out, "--kind", "fp8")[0] == 0
    expand = CompressedTensorsConfig(run_compressed=False)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(out), dtype=torch.float32, device_map="cpu", quantization_config=expand
    )
    files = pretrained.open_files(str(out))
    for name in files.quantised:
        np.testing.assert_array_equal(theirs.get_parameter(name).detach().float().numpy(), files.read(name))
