"""Packed checkpoints: bitsandbytes against the package itself, GPTQ, AWQ and GGUF against their definitions,
jaxft's own.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf
from host_weights import load_on_host
from loading_process import one_device
from quantised_folders import SIZES, by_bitsandbytes, by_llm_int8, is_linear, write_grouped
from safetensors.torch import load_file, save_file
from scripts_in_process import call
from tiny_llama import edit_config, our_logits, some_tokens, tiny_torch, torch_logits, write_folder
from tiny_run import Place, write_place

from jaxft.distributed import sharding
from jaxft.nn import matmul
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import QTensor, Quant, dequantize, quantize, take_rows
from jaxft.train import trainable_params
from jaxft.weights import pretrained
from jaxft.weights.quantised.quantised_checkpoints import FILE_FORMATS, dequantised

torch = pytest.importorskip("torch")


def linear_layers(base):
    """(path, leaf) of the blocks' matrices."""
    return [
        (f"layers/{group}/{name}", x)
        for group in ("attn", "mlp")
        for name, x in base["layers"][group].items()
    ]


def stored(ref, dtype=jnp.float32):
    """(model, Trained, base) of a checkpoint, stored as its files store it."""
    model = pretrained.model_for(str(ref), dtype=dtype)
    t = trainable_params.partition_params(model, Adapter(rank=2), None, Quant("checkpoint"), str(ref))
    return model, t, pretrained.load_base(str(ref), t.stored, one_device())


def assert_same(found, target):
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(target, np.float32))


# bitsandbytes


@pytest.mark.quick_cases("True-nf4", "False-fp4")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_weights_have_its_values_and_stay_quantised(tmp_path, kind, double):
    folder, target = by_bitsandbytes(tmp_path, kind, double)
    tensors = pretrained.open_files(str(folder))
    assert set(tensors.quantised) == set(target)
    model, t, base = stored(folder, jnp.bfloat16)
    for path, leaf in linear_layers(base):
        assert isinstance(leaf, QTensor) and leaf.kind == kind and (leaf.outer is not None) == double
        name = model.weight_names[path][0]
        for i in range(model.config.layers):
            assert_same(dequantize(jax.tree.map(lambda x, i=i: x[i], leaf)).T, target[name.format(i=i)])
            assert_same(jnp.asarray(tensors.read(name.format(i=i)), jnp.bfloat16), target[name.format(i=i)])
    assert pretrained.storage_changes(str(folder), t.stored) == []
    again = trainable_params.partition_params(
        model, Adapter(rank=2), None, Quant(kind, double=double)
    )  # the files have what is asked for
    assert pretrained.storage_changes(str(folder), again.stored) == []
    assert_same(
        pretrained.load_base(str(folder), again.stored, one_device())["layers"]["mlp"]["up"].codes,
        base["layers"]["mlp"]["up"].codes,
    )


def test_blocks_that_run_across_rows_are_dequantised_to_the_same_values(tmp_path):
    folder, target = by_bitsandbytes(tmp_path, "nf4", True, hidden_size=96, intermediate_size=128)
    model, t, base = stored(folder, jnp.bfloat16)
    assert isinstance(base["layers"]["mlp"]["down"], QTensor) and base["layers"]["mlp"]["down"].kind == "nf4"
    assert base["layers"]["attn"]["q"].kind == "bits"
    assert_same(
        dequantize(base["layers"]["attn"]["q"])[1].T, target["model.layers.1.self_attn.q_proj.weight"]
    )
    reported = pretrained.storage_changes(str(folder), t.stored)
    assert (
        len(reported) == 1
        and "dequantised to bfloat16 (its blocks of 64 run across its rows of 96)" in reported[0]
    )
    assert "layers/attn/q" in reported[0] and "layers/mlp/down" not in reported[0]


def test_codes_stay_quantised_with_another_map_of_scales(tmp_path):
    folder, _ = by_bitsandbytes(tmp_path, "nf4", True)
    state = load_file(folder / "model.safetensors")
    for name in state:
        if name.endswith("nested_quant_map"):
            state[name] = torch.linspace(-1, 1, 256)
    save_file(state, folder / "model.safetensors")
    model, t, base = stored(folder)
    tensors, name = pretrained.open_files(str(folder)), "model.layers.0.mlp.up_proj.weight"
    absmax = state[f"{name}.absmax"].numpy()
    offset = json.loads(state[f"{name}.quant_state.bitsandbytes__nf4"].numpy().tobytes())["nested_offset"]
    scale = np.linspace(-1, 1, 256, dtype=np.float32)[absmax] * state[f"{name}.nested_absmax"].numpy()[
        0
    ] + np.float32(offset)
    np.testing.assert_allclose(base["layers"]["mlp"]["up"].scale[0].T.reshape(-1), scale, rtol=1e-6)
    assert base["layers"]["mlp"]["up"].outer is None
    assert "scales are stored in float32" in pretrained.storage_changes(str(folder), t.stored)[0]
    assert_same(tensors.read(name).T, dequantize(jax.tree.map(lambda x: x[0], base["layers"]["mlp"]["up"])))


def test_8_bit_weights_are_codes_times_scb(tmp_path):
    folder, reference = by_llm_int8(tmp_path)
    tensors = pretrained.open_files(str(folder))
    for name in [name for name in tensors.tensors if is_linear(name)]:
        assert_same(tensors.read(name), reference.get_parameter(name).detach())
        assert tensors.quantised[name].layout.kind == "int8"


# GPTQ and AWQ


GROUPED = {
    "gptq": dict(method="gptq"),
    "gptq, symmetric": dict(method="gptq", sym=True),
    "gptq, act-order": dict(method="gptq", ordered=True),
    "gptq, symmetric, act-order": dict(method="gptq", sym=True, ordered=True),
    "gptq, one group": dict(method="gptq", group=-1, ordered=True),
    "gptq, groups with a rest": dict(method="gptq", group=40),
    "gptq_v2": dict(method="gptq", less=0, checkpoint_format="gptq_v2"),
    "gptq_v2 by format": dict(method="gptq", less=0, format="gptq_v2"),
    "gptq_v2 by both": dict(method="gptq", less=0, format="GPTQ_v2", checkpoint_format="gptq_v2"),
    "gptq by format": dict(method="gptq", format="gptq", checkpoint_format=None),
    "awq": dict(method="awq", zero_point=True, version="gemm"),
    "awq by format": dict(method="awq", format="gemm"),
}


@pytest.mark.quick_cases("gptq", "gptq, symmetric, act-order", "gptq, groups with a rest", "gptq_v2*", "awq*")
@pytest.mark.parametrize("case", GROUPED)
def test_gptq_and_awq_weights_have_the_values_of_their_definition(tmp_path, case):
    folder, reference = write_grouped(tmp_path, **GROUPED[case])
    model, t, base = stored(folder)
    assert base["layers"]["mlp"]["down"].kind == ("int4" if "symmetric" in case else "affine4")
    tensors = pretrained.open_files(str(folder))
    for name in tensors.quantised:
        np.testing.assert_array_equal(tensors.read(name), reference.get_parameter(name).detach().numpy())
    expand = load_on_host(str(folder), model, lambda path, x: jnp.asarray(x))
    target = torch_logits(reference, some_tokens())
    np.testing.assert_allclose(our_logits(model, base, some_tokens()), target, atol=2e-4)
    np.testing.assert_allclose(our_logits(model, expand, some_tokens()), target, atol=2e-4)


def test_a_group_index_works_in_matmuls_tables_and_on_meshes(tmp_path):
    folder, reference = write_grouped(tmp_path, "gptq", ordered=True)
    model, t, base = stored(folder)
    q = jax.tree.map(lambda x: x[0], base["layers"]["mlp"]["up"])
    x, whole = jax.random.normal(jax.random.key(0), (5, 64)), dequantize(q)
    ids = jnp.array([3, 60, 3])
    assert_same(take_rows(q, ids), whole[ids])
    for fn in (matmul.linear, jax.grad(lambda x, w: matmul.linear(x, w).sum())):
        np.testing.assert_allclose(fn(x, q), fn(x, whole), rtol=1e-5, atol=1e-5)
    target = our_logits(model, base, some_tokens(8))
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        many = pretrained.load_base(str(folder), t.stored, mesh)
        found = jax.jit(lambda p, tokens: model.logits(model.head(p), model.hidden(p, tokens)[0]))(
            many, some_tokens(8)
        )
    np.testing.assert_allclose(found, target, atol=2e-4)
    down = many["layers"]["mlp"]["down"]
    assert down.codes.sharding.spec[-2] == ("tensor", "fsdp") and down.scale.sharding.spec[-2] is None


def bad(tmp_path, method="gptq", drop=None, change=None, **settings):
    folder, _ = write_grouped(tmp_path, method, **settings)
    state = load_file(folder / "model.safetensors")
    for name in list(state):
        if drop and name.endswith(drop):
            del state[name]
        if change and name.endswith(change[0]):
            state[name] = change[1](state[name]).contiguous()
    save_file(state, folder / "model.safetensors")
    return str(folder)


REFUSED = {
    "bits": (dict(bits=3), "gptq weights of 3 bits, but jaxft reads only 4"),
    "group size": (dict(group_size=0), "group_size is 0, expected a number of inputs or -1"),
    "a version": (
        dict(method="awq", version="gemv"),
        "awq weights with version='gemv' in quantization_config, but jaxft reads gemm",
    ),
    "a format": (
        dict(format="marlin"),
        "gptq weights with format='marlin' in quantization_config, but jaxft reads gptq and gptq_v2",
    ),
    "a format that is no name": (dict(format=["gptq"]), r"format=\['gptq'\] in quantization_config"),
    "an AWQ format": (
        dict(method="awq", format="gemv_fast"),
        "awq weights with format='gemv_fast' in quantization_config, but jaxft reads gemm",
    ),
    "two formats": (
        dict(format="gptq", checkpoint_format="gptq_v2"),
        "has checkpoint_format='gptq_v2', format='gptq', which are different layouts",
    ),
    "zeros missing": (dict(drop=".qzeros"), "k_proj.qzeros is missing; download the model again"),
    "scales of another shape": (
        dict(change=(".scales", lambda x: x[:1])),
        r"scales has shape \(1, 32\), expected \(2, 32\)",
    ),
    "a bias": (dict(change=(".bias", torch.ones_like)), "_proj.bias is not zero, but .* has no bias in this"),
    "order undeclared": (
        dict(change=(".g_idx", lambda x: x.flip(0))),
        "g_idx is not in order, which requires desc_act=true",
    ),
    "zeros undeclared": (
        dict(change=(".qzeros", lambda x: x + 1), sym=True),
        "qzeros are not all 8, which requires sym=false",
    ),
    "a group too many": (
        dict(change=(".g_idx", lambda x: x + 9), ordered=True),
        "group numbers from 9 to 10, but the weight has only groups 0 to 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_inconsistent_checkpoint_is_one_line(tmp_path, case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        stored(bad(tmp_path, **settings))


def test_other_methods_and_invalid_quant_states_are_refused(tmp_path):
    folder = write_folder(tmp_path / "hqq", tiny_torch())
    edit_config(folder, quantization_config={"quant_method": "hqq"})
    with pytest.raises(
        ValueError,
        match=f"quant_method='hqq', but jaxft reads {', '.join(FILE_FORMATS)}; use the model's unquantised",
    ):
        pretrained.open_files(str(folder))
    plain = write_folder(tmp_path / "plain", tiny_torch())
    with pytest.raises(
        ValueError,
        match="plain: no quantised weights that quant=checkpoint could store unchanged; use another quant",
    ):
        stored(plain)
    folder, _ = by_bitsandbytes(tmp_path, "nf4", True)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    sizes = ("[64]", "[64, -1]", "[64, 64, 64]", "[64, 64.5]")
    for text in (b"{", b"[]", *(f'{{"shape": {size}, "blocksize": 64}}'.encode() for size in sizes)):
        save_file({**state, name: torch.tensor(list(text), dtype=torch.uint8)}, folder / "model.safetensors")
        with pytest.raises(ValueError, match="is not the state of a 4-bit weight"):
            pretrained.open_files(str(folder))
    for changes in (dict(block=64), dict(double=True)):
        with pytest.raises(ValueError, match="quant=checkpoint takes blocks and scales from the files"):
            Quant("checkpoint", **changes)


# GGUF


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_gguf_blocks_stay_quantised_and_have_the_gguf_packages_values(tmp_path, kind):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_torch(tie_word_embeddings=False), kind)
    model, t, base = stored(path)
    plain = load_on_host(str(path), model, lambda path, x: jnp.asarray(x))
    held = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "affine4"}[kind.name]
    for (_, leaf), (_, target) in zip(linear_layers(base), linear_layers(plain), strict=True):
        assert leaf.kind == held and leaf.block == 32
        assert_same(dequantize(leaf), target)
    np.testing.assert_allclose(
        our_logits(model, base, some_tokens()), our_logits(model, plain, some_tokens()), atol=1e-5
    )
    reported = pretrained.storage_changes(str(path), t.stored)
    assert len(reported) == 2 and all(
        f"quantised by GGUF {kind.name} and dequantised to float32" in line for line in reported
    )
    assert "not along their inputs): embed" in reported[0] or "not along their inputs): embed" in reported[1]
    head = trainable_params.partition_params(
        model, Adapter(rank=2), None, Quant("checkpoint", targets="layers/.*|head"), str(path)
    )
    whole = pretrained.load_base(str(path), head.stored, one_device())
    assert_same(dequantize(whole["head"]), plain["head"])


# jaxft's own files, and out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    write_place(folder)
    return Place(folder)


SAVED = {
    "nf4, blocks of 32": ("nf4", ["--block", "32"]),
    "nf4": ("nf4", []),  # an input of 96 has no whole blocks of 64
    "fp4": ("fp4", ["--no-double"]),
    "int4": ("int4", ["--block", "32"]),
    "affine4": ("affine4", []),
    "int8": ("int8", []),
    "fp8": ("fp8", []),
}


@pytest.mark.quick_cases("nf4, blocks of 32", "int8")
@pytest.mark.parametrize("kind, more", SAVED.values(), ids=SAVED)
def test_a_base_quantised_by_the_script_equals_one_quantised_on_load(
    place, monkeypatch, capsys, tmp_path, kind, more
):
    source, out = place.folder / "base", tmp_path / "packed"
    code, reported, err = call(
        monkeypatch, capsys, "quantize", "--model", source, "--out", out, "--kind", kind, *more
    )
    assert code == 0, err
    assert (
        f" as {kind}, " in reported
        and "bits per quantised parameter; quantisation changed these by" in reported
    )
    quant = Quant(kind, 32 if "--block" in more else None, False if more == ["--no-double"] else None)
    model = pretrained.model_for(str(source))
    found = stored(out, jnp.bfloat16)[2]
    target = pretrained.load_frozen(str(source), model, one_device(), quant)
    for (_, ours), (_, leaf) in zip(linear_layers(found), linear_layers(target), strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(leaf)
        jax.tree.map(assert_same, ours, leaf)
    method = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
    packed = {"nf4": "bitsandbytes" if "--block" in more else "jaxft", "fp8": "compressed-tensors"}
    assert method == packed.get(kind, "jaxft")


def test_transformers_loads_an_nf4_base_and_has_the_same_values(monkeypatch, capsys, tmp_path):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    source, out = write_folder(tmp_path / "base", tiny_torch(**SIZES)), tmp_path / "nf4"
    code, _, err = call(monkeypatch, capsys, "quantize", "--model", source, "--out", out)
    assert code == 0, err
    theirs = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.bfloat16, device_map="cpu")
    model, _, base = stored(out, jnp.bfloat16)
    for i in range(3):
        w = theirs.model.layers[i].mlp.down_proj.weight
        assert_same(
            dequantize(base["layers"]["mlp"]["down"])[i].T,
            dequantize_4bit(w.data, w.quant_state).float().numpy(),
        )
    ours, target = our_logits(model, base, some_tokens()), torch_logits(theirs, some_tokens())
    assert np.abs(ours - target).max() < 0.05 * np.abs(target).max()


@pytest.mark.slow
def test_a_run_on_quantised_files_equals_one_that_quantises_on_load(place):
    base = place.folder / "nf4"
    shutil.copytree(place.folder / "base", place.folder / "wide", dirs_exist_ok=True)
    write_folder(place.folder / "wide", tiny_torch(**SIZES))
    from jaxft.train.export import export

    wide = str(place.folder / "wide")
    export.export_model(
        base,
        export.ExportSource(wide, pretrained.model_for(wide), None),
        "float32",
        export.ExportQuant(Quant()),
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (place.folder / "wide" / name).is_file():
            shutil.copy(place.folder / "wide" / name, base / name)
    argv = ["samples=0", "steps=3"]
    for name, model, quant in (
        ("loaded", "wide", "nf4"),
        ("saved", "nf4", "checkpoint"),
        ("asked", "nf4", "nf4"),
    ):
        assert place.run(*argv, f"model={model}", f"quant={quant}", f"name={name}") == 0, place.err()
    assert place.metrics("loaded") == place.metrics("saved") == place.metrics("asked")
    assert "frozen: " in place.out() and "weights quantised" not in place.out()
    assert place.run(*argv, "model=nf4", "quant=int4", "name=again") == 0, place.err()
    assert (
        "weights quantised by bitsandbytes and rounded again to int4; quant=checkpoint stores them "
        "unchanged: layers/" in place.out()
    )


@pytest.mark.slow
def test_an_exported_run_is_quantised_and_the_change_is_printed(place, monkeypatch, capsys, tmp_path):
    assert place.run("samples=0", "steps=3", "quant=nf4", "name=merged", "lr=0.03") == 0, place.err()
    monkeypatch.chdir(place.folder)
    run, wide, narrow = place.runs("merged"), tmp_path / "wide", tmp_path / "narrow"
    assert call(monkeypatch, capsys, "export", "--run", run, "--out", wide, "--dtype", "float32")[0] == 0
    code, reported, err = call(monkeypatch, capsys, "export", "--run", run, "--out", narrow, "--pack", "int8")
    assert code == 0, err
    assert " as int8, " in reported and "quantisation changed these by 0." in reported
    exact, found = pretrained.open_files(str(wide)), pretrained.open_files(str(narrow))
    name = "model.layers.1.mlp.up_proj.weight"
    assert_same(found.read(name).T, dequantised(quantize(np.ascontiguousarray(exact.read(name).T), "int8")))
