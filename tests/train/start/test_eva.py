"""EVA: directions and ranks are PEFT's, whatever the layout of the rows; the adapter is read by PEFT."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from merged_arrays import merged_arrays
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape
from jaxft.models.adapted import adapted
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import PairRanks, pair_layouts
from jaxft.nn.quant import Quant
from jaxft.train.start import eva
from jaxft.weights import initial_params, pretrained
from jaxft.weights.peft import peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
SETTINGS = Adapter(rank=6, alpha=12.0, init="eva")
NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
LENGTHS = (48, 31, 40, 17)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("base"), tiny_torch())
    return str(folder), pretrained.model_for(str(folder), dtype=jnp.float32)


def padded():
    """Four rows of different lengths, with padding at their ends."""
    tokens = some_tokens(4, max(LENGTHS))
    used = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    return replace(tokens, segments=used.astype(np.int32), ids=np.where(used, tokens.ids, 0))


def packed():
    """The same in two rows of two segments."""
    rows, width = padded(), 96
    blank = np.zeros((2, width), np.int32)
    arrays = {name: blank.copy() for name in ("ids", "segments", "positions")}
    for number, length in enumerate(LENGTHS):
        at = 0 if number < 2 else LENGTHS[number - 2]
        part = number % 2, slice(at, at + length)
        arrays["ids"][part] = rows.ids[number, :length]
        arrays["segments"][part] = 1 + number // 2
        arrays["positions"][part] = np.arange(length)
    return replace(some_tokens(2, width), **arrays)


def begin(world, settings=SETTINGS, batches=None, shape=MeshShape(), devices=1, quant=None):  # noqa: B008
    """(model over the whole tree, base, adapter, lines) with the pairs of EVA."""
    ref, model = world
    mesh, lines = sharding.make_mesh(shape, jax.devices()[:devices]), []
    whole = adapted(model, settings)
    batches = [padded()] if batches is None else batches
    rows = eva.FirstRows(lambda: [jax.tree.map(lambda x: x[None], b) for b in batches], lines.append)
    with jax.set_mesh(mesh):
        base = pretrained.load_frozen(ref, model, mesh, quant)
        fresh = initial_params.init_all_but_base(whole, mesh, 0, initial_params.HeadSettings(settings), ref)[
            "adapter"
        ]
        started = eva.eva_adapter(whole, base, fresh, settings, rows, mesh)
        return whole, base, jax.device_get(started), lines


def theirs(world, monkeypatch, **config):
    """PEFT's principal directions by module, of an exact incremental SVD."""
    from peft.tuners.lora import eva as peft_eva
    from transformers import AutoModelForCausalLM

    exact = peft_eva.IncrementalPCA
    monkeypatch.setattr(
        peft_eva, "IncrementalPCA", lambda n_components, copy, **random: exact(n_components, copy=copy)
    )
    rows = padded()
    batch = {
        "input_ids": torch.tensor(rows.ids).long(),
        "attention_mask": torch.tensor(rows.segments).long(),
    }
    settings = peft.LoraConfig(
        r=6, lora_alpha=12, init_lora_weights="eva", target_modules="all-linear", task_type="CAUSAL_LM",
        **{"eva_config": peft.EvaConfig(rho=2.0), **config},
    )  # fmt: skip
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(world[0]).eval(), settings, low_cpu_mem_usage=True
    )
    vectors = peft.get_eva_state_dict(model, [batch], show_progress_bar=False)
    return model, {name.removeprefix("base_model.model.model."): u for name, u in vectors.items()}


def ranks_of(pairs):
    a = {path: x for path, x in tree.paths(pairs).items() if path.endswith("/a")}
    return {path.split("/")[-2]: np.any(x != 0, -2).sum(-1).tolist() for path, x in a.items()}


@pytest.mark.quick_cases("2.0")
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_directions_and_ranks_are_pefts(world, monkeypatch, rho):
    settings = replace(SETTINGS, eva_rho=rho)
    *_, pairs, lines = begin(world, settings)
    _, expected = theirs(world, monkeypatch, eva_config=peft.EvaConfig(rho=rho))
    ranks = ranks_of(pairs)
    flat = {f"layers.{i}.{NAMES[name]}": r for name, of in ranks.items() for i, r in enumerate(of)}
    assert flat == {name: len(u) for name, u in expected.items()}
    assert sum(flat.values()) == 6 * 21 and (rho > 1) == (len(set(flat.values())) > 1)
    for name, of_layers in ranks.items():
        node = next(x for path, x in tree.paths(pairs).items() if path.endswith(f"/{name}/a"))
        for i, rank in enumerate(of_layers):
            ours, u = node[i][:, :rank], expected[f"layers.{i}.{NAMES[name]}"].numpy()
            np.testing.assert_allclose(ours.T @ ours, np.eye(rank), atol=1e-5)
            np.testing.assert_allclose(np.abs(np.sum(ours * u.T, 0)), 1, atol=2e-3)  # each direction
            angles = np.linalg.svd(u @ ours, compute_uv=False)
            np.testing.assert_allclose(angles, 1, atol=1e-5)
    assert all(not np.any(x) for path, x in tree.paths(pairs).items() if path.endswith("/b"))
    assert f"by the inputs of {sum(LENGTHS)} tokens" in lines[-1]


@pytest.mark.quick_cases("data=4")
@pytest.mark.parametrize("rows", ["packed", "in batches", "data=4", "fsdp=2,tensor=2"])
def test_the_start_is_the_same_for_any_layout_of_the_rows(world, rows):
    *_, expected, _ = begin(world)
    if rows == "packed":
        *_, started, _ = begin(world, batches=[packed()])
    elif rows == "in batches":
        parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], padded()) for i in range(4)]
        *_, started, _ = begin(world, batches=parts)
    else:
        sizes = {name: int(size) for name, size in (x.split("=") for x in rows.split(","))}
        *_, started, _ = begin(world, shape=MeshShape(**{"data": 1, "fsdp": 1, **sizes}), devices=4)
    assert ranks_of(started) == ranks_of(expected)
    same = jax.tree.map(partial(np.testing.assert_allclose, atol=2e-3), started, expected)
    assert jax.tree.leaves(same) == []


@pytest.mark.slow
def test_covariances_in_several_parts_lead_to_the_same_start(world, monkeypatch):
    settings = replace(SETTINGS, targets=("o", "down"))
    *_, expected, whole = begin(world, settings)
    limit = 80_000  # o has 3 * 64 * 64 * 4 bytes, down 3 * 96 * 96 * 4
    monkeypatch.setattr(eva, "MOMENT_BYTES", limit)
    groups = eva._groups({"o": (3, 64, 12), "down": (3, 96, 12)})
    assert groups == [{"o": (0, 64)}, {"down": (0, 69)}, {"down": (69, 96)}]
    *_, started, lines = begin(world, settings)
    assert len(whole) == 2 and len(lines) == 4 and "down (70 to 96 of 96)" in lines[2]
    assert ranks_of(started) == ranks_of(expected)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), started, expected)


@pytest.mark.slow
def test_a_quantised_base_gives_nearly_the_directions_of_its_weights(world):
    *_, exact, _ = begin(world)
    *_, quantised, _ = begin(world, quant=Quant("int8"))
    for path in ("layers/attn/o", "layers/mlp/down"):
        one, two = (tree.paths(x)[f"{path}/a"] for x in (exact, quantised))
        angles = np.linalg.svd(one[1][:, :3].T @ two[1][:, :3], compute_uv=False)
        assert angles.min() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rslora": True},
        {"dora": True},
        {"targets": ("q", "down"), "rank_pattern": (("q_proj", 2),), "modules_to_save": ("norm",)},
    ],
    ids=str,
)
def test_a_trained_adapter_is_the_same_in_peft_merged_and_read_again(world, tmp_path, changes):
    settings = replace(SETTINGS, rank=4, eva_rho=3.0, **changes)
    whole, base, pairs, _ = begin(world, settings)
    used = {path[:-2]: np.any(x != 0, -2) for path, x in tree.paths(pairs).items() if path.endswith("/a")}

    def trained(path, x):
        noise = 0.1 * np.cos(np.arange(x.size)).reshape(x.shape)
        above, _, name = path.rpartition("/")
        if name == "b":
            return np.where(used[above][..., None], noise, 0).astype(np.float32)
        if name == "magnitude":
            return np.where(used[above].any(-1)[:, None], 3 + noise, 0).astype(np.float32)
        return np.asarray(x + noise, np.float32) if name == "weight" else np.asarray(x)

    after = tree.map_with_path(trained, pairs)
    tokens = some_tokens()
    expected = our_logits(whole, {"base": base, "adapter": jax.tree.map(jnp.asarray, after)}, tokens)
    assert np.abs(expected - our_logits(world[1], base, tokens)).max() > 0.1

    written, declared = eva.written_adapter(jax.tree.map(jnp.asarray, after), settings, world[1])
    peft_write.save_adapter(tmp_path, written, declared, world[1], world[0])
    from transformers import AutoModelForCausalLM

    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world[0]).eval(), str(tmp_path)
    ).eval()
    np.testing.assert_allclose(torch_logits(loaded, tokens), expected, atol=1e-4)
    again, read = peft_read.read_adapter(tmp_path, world[1])
    np.testing.assert_allclose(
        our_logits(adapted(world[1], read), {"base": base, "adapter": again}, tokens), expected, atol=1e-4
    )
    merged = merged_arrays(base, again, jnp.float32)
    np.testing.assert_allclose(our_logits(world[1], merged, tokens), expected, atol=1e-4)
    budget = sum(sum(x.ranks) for x in pair_layouts(world[1].specs, settings, world[1].weight_names).values())
    layouts = pair_layouts(world[1].specs, read, world[1].weight_names)
    assert sum(sum(x.ranks) for x in layouts.values()) == budget
    for layout in layouts.values():  # the scale is that of the settings
        for rank, alpha in zip(*layout, strict=True):
            if rank and not settings.rank_pattern:
                assert read.scale_of(rank, alpha) == pytest.approx(settings.scale)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["rank_pattern"]


def test_an_adapter_that_peft_started_by_eva_has_the_same_logits_here(world, monkeypatch, tmp_path):
    model, state = theirs(world, monkeypatch)
    full = {f"base_model.model.model.{name}": u for name, u in state.items()}
    peft.initialize_lora_eva_weights(model, eva_state_dict=full)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    tokens = some_tokens()
    model.save_pretrained(str(tmp_path))
    adapter, settings = peft_read.read_adapter(tmp_path, world[1])
    mesh = sharding.make_mesh(MeshShape(), jax.devices()[:1])
    base = pretrained.load_frozen(*world, mesh)
    ours = our_logits(adapted(world[1], settings), {"base": base, "adapter": adapter}, tokens)
    np.testing.assert_allclose(ours, torch_logits(model, tokens), atol=1e-4)
    assert settings.rank_pattern and settings.alpha_pattern


def test_ranks_go_to_the_largest_fractions_and_a_module_may_get_none():
    layouts = {"layers/attn/q": PairRanks((2, 2), (4.0, 4.0)), "layers/attn/o": PairRanks((2, 0), (4.0, 0.0))}
    explained = {
        "layers/attn/q": [np.array([0.9, 0.05, 0.01, 0.0]), np.array([0.04, 0.03, 0.02, 0.01])],
        "layers/attn/o": [np.array([0.5, 0.3, 0.1, 0.06]), np.array([1.0, 0.0, 0.0, 0.0])],
    }
    ranks = eva.redistributed_ranks(layouts, explained, 2.0)
    assert ranks == {"layers/attn/q": (2, 0), "layers/attn/o": (4, 0)}
    assert eva.redistributed_ranks(layouts, explained, 1.0)["layers/attn/o"] == (2, 0)


def test_lanczos_finds_the_directions_of_a_whole_decomposition(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 40)) * np.logspace(0, -2, 40)
    whole = eva.principal_directions(x.T @ x, 8, "q")
    monkeypatch.setattr(eva, "EXACT_INPUTS", 8)
    directions = eva.principal_directions(x.T @ x, 8, "q")
    np.testing.assert_allclose(directions.vectors, whole.vectors, atol=1e-5)
    np.testing.assert_allclose(directions.explained, whole.explained, rtol=1e-6)
    with pytest.raises(
        ValueError, match="inputs of layers/q, layer 3 are not finite; use adapter.init=default"
    ):
        eva.principal_directions(np.full((3, 3), np.nan), 1, "layers/q, layer 3")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"eva_rho": 3.0}, "need adapter.init=eva"),
        ({"eva_tokens": 5}, "need adapter.init=eva"),
        ({"init": "eva", "eva_rho": 0.5}, "adapter.eva_rho=0.5; expected from 1 to 1000"),
        ({"init": "eva", "eva_tokens": 0}, "adapter.eva_tokens=0; expected at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        Adapter(**settings)
    assert "\n" not in str(caught.value)
