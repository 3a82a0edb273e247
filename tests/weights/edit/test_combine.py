"""Combinations of adapters are those of PEFT's add_weighted_adapter; what they cannot combine is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scripts_in_process import call
from tiny_llama import some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import pair_layouts
from jaxft.weights import pretrained
from jaxft.weights.edit.new_adapters import Combination, NamedAdapter, combine_adapters
from jaxft.weights.peft import adapter_folders, peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
WEIGHTS = (0.7, -0.4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, its model, and a peft model with adapters: left and right have rank 4, and some modules
    in common, wide has rank 6 and rsLoRA.
    """
    folder = write_folder(tmp_path_factory.mktemp("base"), tiny_torch())
    from transformers import AutoModelForCausalLM

    settings = dict(task_type="CAUSAL_LM", r=4)
    left = peft.LoraConfig(**settings, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    right = peft.LoraConfig(**settings, lora_alpha=12, target_modules=["q_proj", "v_proj"])
    wide = peft.LoraConfig(
        task_type="CAUSAL_LM", r=6, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj"]
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(str(folder)), left, adapter_name="left")
    theirs.add_adapter("right", right)
    theirs.add_adapter("wide", wide)
    torch.manual_seed(1)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    saved = tmp_path_factory.mktemp("adapters")
    theirs.save_pretrained(str(saved))
    return folder, pretrained.model_for(str(folder), dtype=jnp.float32), theirs.eval(), saved


def read(world, *names):
    return [NamedAdapter(name, *peft_read.read_adapter(world[3] / name, world[1])) for name in names]


def products(params, name):
    """`scale a b` of a module, [L, in, out]."""
    pair = params["layers"]["mlp" if name == "down" else "attn"][name]
    return np.einsum("lir,lro->lio", pair["a"], pair["b"]) * pair["scale"][:, None, None]


@pytest.mark.parametrize(
    "method, names, options",
    [
        ("cat", ("left", "wide"), {}),
        ("cat", ("left", "right"), {}),
        ("svd", ("left", "wide"), {}),
        ("svd", ("left", "right"), dict(rank=3)),
        ("linear", ("left", "right"), {}),
        ("ties", ("left", "right"), dict(density=0.3)),
        ("ties", ("right", "left"), dict(density=1.0)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_a_combination_is_pefts(world, tmp_path, method, names, options):
    _, model, theirs, _ = world
    renamed = {"rank": "svd_rank", "density": "density"}
    kwargs = {renamed[name]: value for name, value in options.items()}
    with torch.no_grad():
        theirs.add_weighted_adapter(list(names), list(WEIGHTS), "both", method, **kwargs)
    try:
        theirs.save_pretrained(str(tmp_path), selected_adapters=["both"])
        theirs.set_adapter("both")
        logits = torch_logits(theirs, some_tokens(1))
    finally:
        theirs.delete_adapter("both")
    expected, settings = peft_read.read_adapter(tmp_path / "both", model)
    made = combine_adapters(read(world, *names), model, Combination(method, WEIGHTS, **options))
    assert made.settings.rank == made.settings.alpha == settings.rank and not made.settings.rslora
    for name in ("q", "down", "v"):
        if name == "down" and "left" not in names:
            continue
        found, wanted = products(made.params, name), products(expected, name)
        np.testing.assert_allclose(found, wanted, atol=1e-4 if method == "svd" else 1e-5)
        if method != "svd":
            pair = made.params["layers"]["mlp" if name == "down" else "attn"][name]
            theirs_a = expected["layers"]["mlp" if name == "down" else "attn"][name]["a"]
            np.testing.assert_allclose(pair["a"], theirs_a, atol=1e-6)
    assert (made.dropped > 0.01) == (method == "svd")
    peft_write.save_adapter(tmp_path / "ours", made.params, made.settings, model, str(world[0]))
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(world[0]))
    ours = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(torch_logits(ours, some_tokens(1)), logits, atol=1e-4)


def test_svd_drops_the_smallest_singular_values(world):
    adapters = read(world, "left", "wide")
    exact = combine_adapters(adapters, world[1], Combination("cat", WEIGHTS)).params
    lost = total = 0.0
    for name in ("q", "down", "v"):
        values = np.linalg.svd(products(exact, name), compute_uv=False) ** 2
        lost, total = lost + values[:, 5:].sum(), total + values.sum()
    made = combine_adapters(adapters, world[1], Combination("svd", WEIGHTS, rank=5))
    assert made.dropped == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert combine_adapters(adapters, world[1], Combination("svd", WEIGHTS, rank=10)).dropped < 1e-6


def test_dare_drops_at_random_and_has_the_sum_as_its_mean(world):
    """Of 400 seeds, in standard errors of the mean; density 1 drops nothing; a seed repeats."""
    adapters = read(world, "left", "right")

    def a(method, **options):
        made = combine_adapters(adapters, world[1], Combination(method, WEIGHTS, **options))
        return made.params["layers"]["attn"]["q"]["a"]

    linear = a("linear")
    np.testing.assert_allclose(a("dare_linear", density=1.0), linear, rtol=1e-6)
    np.testing.assert_allclose(a("dare_ties", density=1.0), a("ties", density=1.0), rtol=1e-6)
    np.testing.assert_array_equal(a("dare_ties", seed=3), a("dare_ties", seed=3))
    assert np.any(a("dare_ties", seed=3) != a("dare_ties", seed=4))
    found = np.stack([a("dare_linear", density=0.3, seed=seed) for seed in range(100)])
    errors = (found.mean(0) - linear) / (found.std(0) / 10)
    assert abs(errors.mean()) < 0.2 and 0.85 < errors.std() < 1.15
    zeros = np.mean(a("dare_linear", density=0.3) == 0)
    assert zeros == pytest.approx(0.7**2, abs=0.05)  # where both adapters have none


def test_layers_and_ranks_that_differ_get_one_rank_padded_with_zeros(world, tmp_path):
    model = world[1]
    narrow = Adapter(2, 6.0, targets=("q",), layers_to_transform=(0, 2))
    wide = Adapter(5, 5.0, targets=("q",), layers_to_transform=(0,))
    rng = np.random.default_rng(0)
    adapters = []
    for settings in (narrow, wide):
        (layout,) = pair_layouts(model.specs, settings, model.weight_names).values()
        used = np.arange(max(layout.ranks)) < np.array(layout.ranks)[:, None]
        a = rng.normal(size=(3, 64, settings.rank)) * used[:, None]
        b = rng.normal(size=(3, settings.rank, 64)) * used[..., None]
        pair = {"a": a.astype(np.float32), "b": b.astype(np.float32), "scale": np.full(3, settings.scale)}
        adapters.append(NamedAdapter("x", {"layers": {"attn": {"q": pair}}}, settings))
    made = combine_adapters(adapters, model, Combination("cat", (1.0, 2.0)))
    assert made.settings.rank == 7 and made.settings.layers_to_transform == (0, 2)
    expected = sum(w * products(x.params, "q") for w, x in zip((1, 2), adapters, strict=True))
    np.testing.assert_allclose(products(made.params, "q"), expected, atol=1e-4)
    peft_write.save_adapter(tmp_path, made.params, made.settings, model, "base")
    again, settings = peft_read.read_adapter(tmp_path, model)
    np.testing.assert_array_equal(products(again, "q"), products(made.params, "q"))
    assert settings.rank_pattern == ()


def test_adapters_that_have_no_combination_are_refused(world):
    adapters = read(world, "left", "right")
    for changes, words in [
        (dict(dora=True), "DoRA"),
        (dict(modules_to_save=("norm",)), "modules_to_save"),
        (dict(trainable_token_indices=(3,)), "trainable tokens"),
    ]:
        changed = adapters[1]._replace(settings=replace(adapters[1].settings, **changes))
        with pytest.raises(ValueError, match=f"^right: .*{words}.*export"):
            combine_adapters([adapters[0], changed], world[1], Combination("cat", WEIGHTS))


BAD = [
    ("left right --weights 1", "1 for 2 adapters"),
    ("left --weights 1", "at least two"),
    ("left right --weights 1,x", "--weights 1,x"),
    ("left right --weights nan,1", "--weights=nan,1.0; expected a finite number as value 1"),
    ("left left --weights 1,-1", "--method svd --weights 1,-1: the combination of these adapters is 0"),
    ("left left --weights 1,-1 --method cat", "the combination of these adapters is 0, up to rounding"),
    ("left left --weights 1,-1 --method linear", "the combination of these adapters is 0, up to rounding"),
    ("left right --weights 1,1 --method ties --density 1e-9", "or a higher --density"),
    ("left right --weights 1e300,1", "--weights 1e+300,1: the combination has values that are too large"),
    ("left right --weights 1,1e39 --method cat", "too large for float32; use smaller weights"),
    ("left right --weights 0,0", "not all 0"),
    ("left wide --weights 1,1 --method linear", "ranks 4, 6"),
    ("left right --weights 1,1 --rank 65", "at most rank"),
    ("left right --weights 1,1 --method cat --rank 2", "--rank 2 needs --method svd"),
    ("left right --weights 1,1 --density 0.5", "--density 0.5"),
    ("left right --weights 1,1 --method ties --seed 1", "--seed 1"),
    ("left missing --weights 1,1", "missing"),
    ("left left/adapter_config.json --weights 1,1", "adapter_config.json"),
]


@pytest.mark.parametrize("command, word", BAD)
def test_the_command_refuses_in_one_line_and_writes_nothing(world, monkeypatch, capsys, command, word):
    monkeypatch.chdir(world[3])
    argv = [*command.split(), "--out", "out", "--model", str(world[0])]
    code, out, err = call(monkeypatch, capsys, "combine", *argv)
    assert code == 1 and not out and not (world[3] / "out").exists()
    lines = [line for line in err.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], err


def test_the_command_writes_the_adapter_with_a_card(world, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "left").symlink_to(world[3] / "left")
    argv = ["left", world[3] / "right", "--weights", "-1,0.5", "--method", "cat", "--out", "out"]
    code, out, err = call(monkeypatch, capsys, "combine", *argv)
    assert code == 0, err
    assert "cat of -1 left" in out and "rank 8" in out
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "cat: -1 left" in (tmp_path / "out" / "README.md").read_text()
    params, _ = peft_read.read_adapter(tmp_path / "out", world[1])
    left, right = (products(x.params, "q") for x in read(world, "left", "right"))
    np.testing.assert_allclose(products(params, "q"), 0.5 * right - left, atol=1e-5)
    code, _, err = call(monkeypatch, capsys, "combine", *argv[:-1], "left")
    assert code == 1 and "--out left is also an input" in err


def test_an_adapter_for_another_base_is_refused_without_model(world, monkeypatch, capsys, tmp_path):
    shutil.copytree(world[3] / "right", tmp_path / "right")
    config = tmp_path / "right" / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "some/other-model"}
    config.write_text(json.dumps(named))
    argv = [world[3] / "left", tmp_path / "right", "--weights", "1,1", "--out", tmp_path / "out"]
    code, out, err = call(monkeypatch, capsys, "combine", *argv)
    assert code == 1 and not out and not (tmp_path / "out").exists() and err.count("\n") == 1
    assert err.startswith("error: ") and "some/other-model" in err and str(world[0]) in err, err
    assert "--model" in err
    code, _, err = call(monkeypatch, capsys, "combine", *argv, "--model", world[0])
    assert code == 0 and "warning: " in err and "some/other-model" in err, err


def test_an_adapter_is_written_to_a_new_folder_at_once(world, monkeypatch, tmp_path):
    (one,) = read(world, "left")
    new = adapter_folders.NewAdapter(one.params, one.settings, str(world[0]), "A test.")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("a file of the user")

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(adapter_folders, "write_card", fail)  # after the weights are written
        with pytest.raises(OSError, match="disk full"):
            adapter_folders.write_adapter(tmp_path / "out", new, world[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out.part"]
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ValueError, match="^--out . is the working directory"):
        adapter_folders.write_adapter(Path("."), new, world[1])
    monkeypatch.chdir(tmp_path)
    adapter_folders.write_adapter(Path("out"), new, world[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.part"]
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "out.part").stat().st_mode
    assert (tmp_path / "out.part" / "mine").is_file() and "# out" in Path("out/README.md").read_text()
    with pytest.raises(ValueError, match="^--out out exists and is not empty"):
        adapter_folders.write_adapter(Path("out"), new, world[1])
