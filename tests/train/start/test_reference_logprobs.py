"""The reference policy is the model at step 0, whatever is trained; its cached log-probs are the same."""

import dataclasses
import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_batches import assert_same
from random_adapter import save_random_adapter
from tiny_llama import tiny_torch, write_folder
from tiny_pairs import make_rows, write
from tiny_tokenizers import tiny as tiny_tokenizer

from jaxft.data.pairs import PairRows
from jaxft.models.adapted import HeadSettings
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant, dequantize
from jaxft.objectives import metrics
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.preference import preference
from jaxft.optim.optimizer import Optim
from jaxft.train.export import export
from jaxft.train.programs import build, start
from jaxft.train.settings import Run
from jaxft.train.start import eva, reference_logprobs
from jaxft.train.step import accumulate_gradients
from jaxft.weights import pretrained
from jaxft.weights.edit import lora_start, merged_weights
from jaxft.weights.peft import adapter_folders, peft_read

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, an adapter with b != 0 in sft/adapter, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("reference")
    write_folder(folder / "base", tiny_torch())
    write(folder / "rows.jsonl", make_rows(20))
    with jax.enable_x64(True):
        model, settings = (
            pretrained.model_for(str(folder / "base"), dtype=jnp.float64),
            Adapter(rank=3, alpha=6.0, targets=("q", "up")),
        )
        save_random_adapter(folder / "sft" / "adapter", model, settings)
    return folder


def run_of(folder, **changes):
    """A run in float64, by default plain LoRA."""
    model = pretrained.model_for(str(folder / "base"), dtype=jnp.float64)
    given = {
        "objective": partial(preference, loss=dpo),
        "data": PairRows(str(folder / "rows.jsonl"), held_out=0.2, batch=4, max_length=64),
        "adapter": Adapter(rank=4),
        "optim": Optim(lr=0.03, warmup=0.0),
    }
    return Run("law", str(folder / "base"), model, **{**given, **changes})


def started(run, folder):
    """(programs, state at step 0, frozen leaves, source)."""
    source = run.data.open(pretrained.load_tokenizer(run.weights), cache=folder / "cache")
    programs = build(run, 10, jax.devices()[:1])
    rows = eva.FirstRows(partial(eva.first_batches, source, 300), print)
    with jax.set_mesh(programs.mesh):
        return programs, *start(run, programs, None, rows=rows), source


STARTS = {
    "plain LoRA": lambda folder, model: {},
    "an SFT adapter": lambda folder, model: {
        "start": str(folder / "sft"),
        "adapter": adapter_folders.read_adapter_settings(str(folder / "sft"), model),
    },
    "norms and LoRA": lambda folder, model: {"train": "adapter/.*|base/.*norm"},
    "LoRA on the head": lambda folder, model: {"adapter": Adapter(rank=4, targets=("v", "head"))},
    "full": lambda folder, model: {"adapter": None},
    "DoRA": lambda folder, model: {"adapter": Adapter(rank=4, targets=("v", "head"), dora=True)},
    "PiSSA": lambda folder, model: {"adapter": Adapter(rank=4, targets=("v", "up"), init="pissa")},
    "EVA": lambda folder, model: {"adapter": Adapter(rank=4, targets=("v", "up"), init="eva")},
}
COPIES = {
    "plain LoRA": False,
    "an SFT adapter": True,
    "norms and LoRA": True,
    "LoRA on the head": False,
    "full": True,
    "DoRA": False,
    "PiSSA": True,
    "EVA": False,
}


@pytest.mark.quick_cases("plain LoRA", "full", "PiSSA")
@pytest.mark.parametrize("kind", STARTS)
def test_the_first_loss_is_log_2_and_the_reference_remains_the_model_at_step_0_bit_for_bit(folder, kind):
    run = run_of(folder)
    run = dataclasses.replace(run, **STARTS[kind](folder, run.model))
    p, state, frozen, source = started(run, folder)
    assert bool(jax.tree.leaves(state.aux)) == COPIES[kind]
    batch = source.batch(0)[0]
    rows = jax.tree.map(lambda x: x[0], batch)

    @jax.jit
    def look(trainable, frozen, aux):
        seen = p.objective.forward(tree.combine(trainable, frozen), rows, None, aux)
        return seen.reference, seen.logp

    with jax.set_mesh(p.mesh):
        known, policy = jax.device_get(look(state.trainable, frozen, state.aux))
        np.testing.assert_allclose(known, policy, atol=1e-12)
        losses = []
        for _ in range(3):
            state, found = p.train_step(state, frozen, batch)
            losses.append(metrics.as_floats(found)["loss"])
        after, moved = jax.device_get(look(state.trainable, frozen, state.aux))
    assert losses[0] == pytest.approx(math.log(2), rel=1e-12) and losses[2] < losses[0] - 0.01
    np.testing.assert_array_equal(after, known)
    assert np.abs(moved - policy).max() > 0.1


def test_precomputed_log_probs_have_the_metrics_and_gradients_of_a_reference_forward_pass(folder, tmp_path):
    live, known = (
        run_of(folder, objective=partial(preference, loss=dpo, reference=r)) for r in ("start", "precomputed")
    )
    p, state, frozen, source = started(live, folder)
    other = build(known, 10, jax.devices()[:1])
    logps = jax.jit(
        lambda whole, batch: p.objective.score(whole, jax.tree.map(lambda x: x[0], batch), {}).logps
    )

    def compute(batches):
        return [np.asarray(logps(tree.combine(state.trainable, frozen), batch))[None] for batch in batches]

    cached = reference_logprobs.add_cached_logps(source, tmp_path / "r.npz", compute, lambda text: None)
    moved = jax.tree.map(
        lambda x: x + 0.05 * jnp.cos(50 * jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), state.trainable
    )

    def metrics_and_grads(objective, batch):
        grads, found = jax.jit(lambda *args: accumulate_gradients(objective, *args, jax.random.key(0), {}))(
            (moved, frozen), batch
        )
        return metrics.as_floats(found)["loss"], grads, metrics.as_floats(found)

    batch, given = source.batch(0)[0], cached.batch(0)[0]
    exact = compute([batch])[0]
    real = batch.responses < batch.lengths.shape[2] * 2
    np.testing.assert_allclose(given.reference[real], exact[real], rtol=2e-7)
    assert not given.reference[~real].any() and batch.reference is None
    expected = metrics_and_grads(p.objective, batch)
    assert expected[2]["kl"] > 1e-3
    assert_same(metrics_and_grads(other.objective, given.replace(reference=exact)), expected)
    assert_same(metrics_and_grads(other.objective, given), expected, 2e-6)  # stored in float32
    for batch, given in zip(source.held_out, cached.held_out):
        assert given.reference.any() and given.reference.shape == batch.read.shape


def marks(batches, computed=None):
    """A stand-in for a model: log-probs that depend only on the target and its slot."""
    for batch in batches:
        if computed is not None:
            computed += [int(pair) for pair in batch.index.ravel() if pair >= 0]
        yield -(batch.targets + 1) / 7 - batch.offsets / 3


def with_cached_logps(folder, rows, name="cached"):
    """(indices of the computed pairs, printed lines, the source with log-probs) for these rows."""
    write(folder / "r.jsonl", rows)
    computed, lines = [], []
    rows = PairRows(str(folder / "r.jsonl"), batch=4)
    source = rows.open(tiny_tokenizer("chatml"), cache=folder / "cache")
    found = reference_logprobs.add_cached_logps(
        source,
        reference_logprobs.cache_file(name, folder),
        lambda batches: marks(batches, computed),
        lines.append,
    )
    for batch in (*[found.batch(k)[0] for k in range(found.info.steps)], *found.held_out):
        real = batch.responses < batch.lengths.shape[2] * 2
        np.testing.assert_array_equal(batch.reference[real], next(marks([batch]))[real].astype(np.float32))
    return sorted(computed), lines, found


def test_only_pairs_that_are_not_cached_are_computed(tmp_path):
    rows = make_rows(15)
    computed, lines, _ = with_cached_logps(tmp_path, rows)
    assert computed == list(range(15)) and lines == [
        "reference log-probs: 0 of 15 pairs are cached, 15 to compute"
    ]
    computed, lines, _ = with_cached_logps(tmp_path, rows)
    assert computed == [] and lines == ["reference log-probs: 15 of 15 pairs are cached, 0 to compute"]
    rows[6]["rejected"] += " changed"
    assert with_cached_logps(tmp_path, rows)[0] == [6]
    rows[6]["prompt"] = "another " + rows[6]["prompt"]
    assert with_cached_logps(tmp_path, rows)[0] == [6]
    other_pairs_in_another_order = [*rows[9:], *rows[:3], *make_rows(16)[15:]]
    assert with_cached_logps(tmp_path, other_pairs_in_another_order)[0] == [9]
    assert with_cached_logps(tmp_path, make_rows(15))[0] == []  # earlier rows are still cached
    assert with_cached_logps(tmp_path, rows, name="another model")[0] == list(range(15))


@pytest.mark.parametrize("damage", ("flipped", "truncated", "empty", "no zip", "other arrays"))
def test_a_damaged_cache_is_computed_again(tmp_path, damage):
    rows = make_rows(6)
    with_cached_logps(tmp_path, rows)
    path = reference_logprobs.cache_file("cached", tmp_path)
    data = path.read_bytes()
    at = data.index(b"values.npy") + 200
    flipped = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
    path.write_bytes(
        {"flipped": flipped, "truncated": data[:-40], "empty": b"", "no zip": b"not a zip"}.get(damage, data)
    )
    if damage == "other arrays":
        np.savez(path, keys=np.array(["a", "b"]), offsets=np.array([0, 3]), values=np.zeros(9))
    assert with_cached_logps(tmp_path, rows)[0] == list(range(6))
    assert with_cached_logps(tmp_path, rows)[0] == []


def test_log_probs_that_cannot_be_cached_are_reported_once_and_used(tmp_path, monkeypatch):
    (tmp_path / "reference").write_text("a file where the folder should be")
    computed, lines, _ = with_cached_logps(tmp_path, make_rows(5))
    assert (
        computed == list(range(5))
        and len(lines) == 2
        and "can't be cached" in lines[1]
        and "\n" not in lines[1]
    )


def test_the_cache_key_of_a_reference_is_its_weights_adapter_and_settings():
    settings = {"config": {"layers": 2}, "dtype": "float32"}
    same, others = (
        reference_logprobs.reference_fingerprint("w", None, settings),
        [
            reference_logprobs.reference_fingerprint("v", None, settings),
            reference_logprobs.reference_fingerprint("w", "adapter", settings),
            reference_logprobs.reference_fingerprint("w", None, {**settings, "dtype": "bfloat16"}),
        ],
    )
    assert (
        reference_logprobs.reference_fingerprint("w", None, dict(reversed(settings.items()))) == same
        and len({same, *others}) == 4
    )


def test_heads_that_start_as_only_the_policy_can_are_refused(folder):
    for theirs, match in (
        (Adapter(init="eva"), "has init=eva, which is for the policy's adapter; set init=default"),
        (Adapter(init="pissa"), "has init=pissa, which is for the policy's adapter; set init=default, also"),
    ):
        with pytest.raises(ValueError, match=match):
            build(run_of(folder, heads={"critic": HeadSettings(theirs)}), 10, jax.devices()[:1])


def at(params, path):
    return reduce(lambda node, key: node[key], path.split("/"), params)


@pytest.mark.quick_cases("olora*")
@pytest.mark.parametrize("init, quant", [("olora", None), ("loftq", Quant("nf4", block=16))])
def test_a_run_resumes_with_its_first_pairs_and_exports_for_the_unchanged_base(
    folder, tmp_path, monkeypatch, init, quant
):
    run = run_of(folder, adapter=Adapter(rank=4, targets=("v", "up"), init=init), quant=quant, samples=0)
    p = build(run, 10, jax.devices()[:1])
    with jax.set_mesh(p.mesh):
        state, frozen = start(run, p, None, folder=tmp_path)
        monkeypatch.setattr(lora_start, "start_pairs", None)  # which takes long, and could differ
        resumed, again = start(run, p, state, folder=tmp_path)
        assert resumed is state
        jax.tree.map(np.testing.assert_array_equal, again, frozen)
    start_pairs = lora_start.read_start(tmp_path, run.model, run.adapter)
    trained = tree.map_with_path(
        lambda path, x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), state.trainable["adapter"]
    )
    adapter = tree.combine(trained, frozen["adapter"])
    params = {"base": frozen["base"], "adapter": adapter}
    tokenizer = pretrained.load_tokenizer(run.weights)
    out = export.export_run(p.partition, params, run, tokenizer, tmp_path, start_pairs)
    written, settings = peft_read.read_adapter(out, run.model)
    assert settings == run.adapter.exported
    readers = pretrained.open_params(run.weights, run.model)
    whole, found = (merged_weights.merge_files(readers, run.model, x, np.float64) for x in (None, written))
    expected = merged_weights.merge_params(frozen["base"], adapter, np.float64)
    for path in ("layers/attn/v", "layers/mlp/up"):
        weight, ours, trained_weight = (at(x, path)[1] for x in (whole, found, expected))
        stored = at(frozen["base"], path)
        stored = np.asarray(dequantize(stored) if quant else stored, np.float64)[1]
        first = {name: np.asarray(x[1], np.float64) for name, x in at(start_pairs, path).items()}
        rounding = weight - first["scale"] * first["a"] @ first["b"] - stored  # of the base, which stays
        assert np.abs(rounding).max() < 1e-6 if quant is None else np.abs(rounding).max() > 1e-3
        np.testing.assert_allclose(ours - trained_weight, rounding, atol=2e-6)
