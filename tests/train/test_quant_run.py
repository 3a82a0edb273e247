"""Whole runs on a quantised base: gone on with is uninterrupted, on a mesh as on one device, asked and merged as trained."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dpo_place import write_pair_place
from scripts_in_process import call
from tiny_llama import some_tokens, tiny_torch, write_folder
from tiny_run import Place, write_place

from jaxft.distributed import sharding
from jaxft.models.adapted import adapted
from jaxft.nn import param
from jaxft.nn.lora import Adapter
from jaxft.nn.quant import KINDS, Quant, is_qtensor
from jaxft.runs import folder as runfolder
from jaxft.train import partition
from jaxft.weights import adapters, pretrained, storage
from jaxft.weights.place import load_param


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
SLOW = {kind: pytest.mark.slow for kind in KINDS if kind not in ("nf4", "int8")}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in KINDS])
def test_a_killed_run_ends_as_one_that_was_left_alone(place, kind):
    argv = [*SHORT, f"quant={kind}", "dropout=0.2", "micro=2"]
    assert place.run(*argv, f"name={kind}-alone") == 0, place.err()
    assert f"frozen: 69 % of the base in {kind}, " in place.out()
    place.run_with_a_kill(*argv, name=kind)
    alone, found = place.results(f"{kind}-alone", 3), place.results(kind, 3)
    assert (
        alone["metrics"] == found["metrics"]
        and alone["leaves"] == found["leaves"]
        and alone["files"] == found["files"]
    )
    record = json.loads((place.runs(kind) / "config.json").read_text())
    assert record["quant"] == {"kind": kind, "block": None, "double": None, "targets": "all-linear"}
    assert (
        f"The frozen weights were quantised: 69 % of the base in {kind}, "
        in (place.runs(kind) / "README.md").read_text()
    )
    assert not any("base" in path for path in place.leaves(kind, 3))  # it is made anew from the weights


def test_another_form_is_another_run_and_what_does_not_fit_is_one_line(place):
    assert place.run(*SHORT, "quant=nf4", "name=one") == 0, place.err()
    for argv, words in (
        ("quant=int8", "quant.kind: 'nf4' -> 'int8'"),
        ("quant=none", "-> None"),
        ("quant.block=32", "quant"),
    ):
        assert place.run(*SHORT, *({"quant=nf4", argv} if "." in argv else {argv}), "name=one") == 1
        assert f"(quant{'' if argv == 'quant=none' else '.'}" in place.err() and words in place.err()
        assert place.err().count("->") == 1 and "choose another name" in place.err()
    assert place.run(*SHORT, "quant=nf4", "full=true", "name=wrong") == 1
    assert place.err() == (
        "error: quant=nf4 freezes base/layers/attn/k, which is trainable; train an adapter, or set quant=none\n"
    )
    mesh = ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=2"]
    assert place.run(*SHORT, "quant=nf4", *mesh, "name=wrong", devices=2) == 1
    assert place.err() == (
        "error: base/layers/attn/o: an input axis of 64 in blocks of 64 can't be sharded over tensor=2; "
        "use one of (1,), or another quant.block\n"
    )
    path = place.folder / "base" / "model.safetensors"
    kept = path.read_bytes()
    start = int.from_bytes(kept[:8], "little") + 8
    entry = json.loads(kept[8:start])["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    path.write_bytes(kept[: start + entry[0]] + np.float32(np.nan).tobytes() + kept[start + entry[0] + 4 :])
    assert place.run(*SHORT, "quant=nf4", "name=wrong") == 1
    assert place.err() == (
        f"error: base: model.layers.1.mlp.up_proj.weight: 1 of {96 * 64} values are not finite or too large, the first nan "
        "at (0, 0)\n"
    )
    path.write_bytes(kept)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_run_on_a_mesh_has_the_losses_of_one_device(place, kind):
    argv = [*SHORT, f"quant={kind}", "batch=8", "lr=0.0001", *(["quant.block=16"] if kind == "nf4" else [])]
    assert place.run(*argv, f"name={kind}-one") == 0, place.err()
    sizes = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    assert place.run(*argv, *sizes, f"name={kind}-many", devices=8) == 0, place.err()
    for a, b in zip(place.metrics(f"{kind}-one"), place.metrics(f"{kind}-many"), strict=True):
        for key in a.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4)


def test_a_run_is_asked_and_merged_as_it_was_trained(place, monkeypatch, capsys, tmp_path):
    assert place.run(*SHORT, "quant=nf4", "name=asked", "lr=0.03") == 0, place.err()
    run = place.runs("asked")
    monkeypatch.chdir(place.folder)
    script = lambda name, *args: call(monkeypatch, capsys, name, *args)  # noqa: E731
    ask = ["--prompt", "what is 20 plus 20?", "--prompt", "ab", "--max-new", "6", "--json"]

    def answers(*args):
        code, out, err = script("generate", *args, *ask)
        assert code == 0, err
        return [json.loads(line)["completion"].strip() for line in out.splitlines()]

    found = answers("--run", run)
    assert found == answers(
        "--model", "base", "--adapter", run / "adapter", "--quant", "nf4", "--dtype", "float32"
    )
    assert found != answers("--run", run, "--quant", "none")

    code, out, _ = script("export", "--run", run, "--out", tmp_path / "wide", "--dtype", "float32")
    assert code == 0 and "base as nf4 with" in out and "rounding" not in out
    assert answers("--model", tmp_path / "wide", "--dtype", "float32") == found
    code, out, _ = script("export", "--run", run, "--out", tmp_path / "narrow")
    assert code == 0 and "rounding changed the weights by 0.1" in out

    ref, adapter, record = runfolder.trained_weights(run)
    model = pretrained.model_for(ref, dtype=jnp.float32)
    mesh = sharding.make_mesh(sharding.MeshShape(), None)
    loaded, settings = adapters.load_adapter(adapter, model, mesh)
    whole = {"base": pretrained.load_frozen(ref, model, mesh, Quant(**record["quant"])), "adapter": loaded}
    merged = {"base": pretrained.load_base(str(tmp_path / "wide"), model, lambda _, x: jnp.asarray(x))}
    logits = [
        np.asarray(full.logits(full.head(params), full.hidden(params, some_tokens())))
        for full, params in ((adapted(model, settings), whole), (adapted(model, None), merged))
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-4)


def test_tables_and_heads_are_packed_as_they_are_read(tmp_path):
    folder = str(write_folder(tmp_path, tiny_torch(tie_word_embeddings=False)))
    model, mesh = pretrained.model_for(folder), sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    t = partition.partition_params(
        model, Adapter(rank=2), None, Quant("nf4", 16, targets="embed|head|layers/attn/q")
    )
    base = pretrained.load_base(folder, t.stored, mesh)
    wanted = partition.split_params(t, storage.sharded_shapes(t.stored, mesh))[1]["base"]
    shapes = lambda leaf: [(x.shape, x.dtype) for x in jax.tree.leaves(leaf)]  # noqa: E731
    for name in ("embed", "head"):
        assert (
            is_qtensor(base[name])
            and base[name].mean.shape == ()
            and shapes(base[name]) == shapes(wanted[name])
        )


def test_an_adapter_that_was_trained_on_another_base_is_named(tmp_path):
    start, identity = str(tmp_path / "first"), {"files": "one"}
    (tmp_path / "first" / "adapter").mkdir(parents=True)
    assert adapters.base_differences(start, identity, Quant()) == []  # nothing is known
    record = {"weights": "there", "weights_fingerprint": identity, "quant": {"kind": "nf4"}}
    (tmp_path / "first" / "config.json").write_text(json.dumps(record))
    assert adapters.base_differences(start, identity, Quant()) == []
    lines = adapters.base_differences(start, {"files": "two"}, None)
    assert [line.split(" was trained on ")[1] for line in lines] == [
        "there, whose weights differ from this run's", "a base with quant=nf4, but this run has quant=none",
    ]  # fmt: skip
    assert adapters.base_differences(f"{start}/adapter", identity, None) == []


def test_the_reference_of_a_quantised_run_is_its_own(pairs):
    told = "reference log-probs: {} of 24 pairs are cached, {} to compute"
    seen = {}
    for kind, found in (("nf4", 0), ("none", 0), ("nf4", 24)):
        argv = ["reference=precomputed", "steps=1", f"quant={kind}", f"name={kind}-{found}"]
        assert pairs.run(*argv, JAXFT_CACHE=str(pairs.folder / "cache")) == 0, pairs.err()
        assert told.format(found, 24 - found) in pairs.out()
        first = next(line for line in pairs.metrics(f"{kind}-{found}") if "loss" in line)
        assert first["loss"] == pytest.approx(0.6931472, rel=1e-5)
        seen[kind, found] = first["logps/chosen"]
    assert seen["nf4", 0] == seen["nf4", 24] != seen["none", 0]


def test_loading_holds_a_layer_in_floats_and_never_a_stacked_leaf(tmp_path):
    folder = str(
        write_folder(tmp_path, tiny_torch(hidden_size=128, intermediate_size=512, num_hidden_layers=32))
    )
    model, mesh = pretrained.model_for(folder), sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    t = partition.partition_params(model, Adapter(rank=2), None, Quant())
    path, leaf = "base/layers/mlp/up", pretrained.open_params(folder, model)["layers/mlp/up"]
    like = storage.leaf_shapes(param.spec_paths(t.specs)[path], t.storage[path])
    places = storage.leaf_sharding(param.spec_paths(t.specs)[path], like, mesh, path)
    load_param(leaf, like, places, False)  # what jax keeps of it is there before the measurement
    tracemalloc.start()
    found = load_param(leaf, like, places, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    layer = 128 * 512 * 4
    assert peak < sum(x.nbytes for x in jax.tree.leaves(found)) + 6 * layer < 32 * layer / 3
