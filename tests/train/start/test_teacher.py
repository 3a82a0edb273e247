"""A run's second model: what it computes, that it stays as it is, what it costs, and what is refused."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_adapter import save_random_adapter
from tiny_llama import tiny_torch, write_folder
from tiny_model import CONFIG
from tiny_pairs import make_rows, write
from transformers import AutoTokenizer

from jaxft.data.pairs import PairRows
from jaxft.distributed import sharding
from jaxft.models.adapted import HeadSettings, Teacher, adapted
from jaxft.models.families.llama import llama
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.objectives import metrics
from jaxft.objectives.logprobs import HeadInput
from jaxft.objectives.losses.policy_losses import FixedKL
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.losses.reference_free_losses import simpo
from jaxft.objectives.objective import Facts, Objective
from jaxft.objectives.policy import policy
from jaxft.objectives.preference import mean_logp, preference
from jaxft.objectives.read_positions import read_logps
from jaxft.optim.optimizer import Optim
from jaxft.plan import plan, program_bytes
from jaxft.runs.terminal import error_line
from jaxft.train import programs
from jaxft.train.logs.nonfinite import first_output, make_layer_outputs
from jaxft.train.programs import build, start
from jaxft.train.settings import Run
from jaxft.train.start.jobs import weight_fingerprints
from jaxft.train.start.teacher import check_teacher_files, find_teacher, load_teacher, teacher_lines
from jaxft.train.sweep import Sweep
from jaxft.weights import pretrained
from jaxft.weights.peft import adapter_folders

pytestmark = pytest.mark.usefixtures("x64")

DPO = partial(preference, loss=dpo, reference="teacher")


def model_of(folder, **options):
    return pretrained.model_for(str(folder), dtype=jnp.float64, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, other/ with twice the width, an adapter with b != 0 in sft/adapter, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("teacher")
    write_folder(folder / "base", tiny_torch())
    write_folder(folder / "other", tiny_torch(1, hidden_size=128, num_hidden_layers=2))
    write(folder / "rows.jsonl", make_rows(20))
    with jax.enable_x64(True):
        model, settings = model_of(folder / "base"), Adapter(rank=3, alpha=6.0, targets=("q", "head"))
        save_random_adapter(folder / "sft" / "adapter", model, settings, HeadSettings(settings))
    return folder


def run_of(folder, **changes):
    """A run in float64 whose teacher is its base, with the teacher as the reference."""
    given = {
        "objective": DPO,
        "data": PairRows(str(folder / "rows.jsonl"), held_out=0.2, batch=4, max_length=64),
        "adapter": Adapter(rank=4),
        "optim": Optim(lr=0.03, warmup=0.0),
        "teacher": Teacher(),
    }
    return Run("law", str(folder / "base"), model_of(folder / "base"), **{**given, **changes})


def started(run, folder):
    """(programs, state at step 0, frozen leaves, the first batch)."""
    source = run.data.open(pretrained.load_tokenizer(run.weights), cache=folder / "cache")
    p = build(run, 10, jax.devices()[:1])
    with jax.set_mesh(p.mesh):
        return p, *start(run, p, None), source.batch(0)[0]


def adapter_of(folder):
    settings = adapter_folders.read_adapter_settings(str(folder / "sft"), model_of(folder / "base"))
    return {"start": str(folder / "sft"), "adapter": settings}


TEACHERS = {
    "the base": lambda folder: Teacher(),
    "an adapter": lambda folder: Teacher(**adapter_of(folder)),
    "weights": lambda folder: Teacher(weights=str(folder / "other"), model=model_of(folder / "other")),
    "quantised": lambda folder: Teacher(
        weights=str(folder / "other"), model=model_of(folder / "other"), quant=Quant("nf4")
    ),
    "weights with an adapter": lambda folder: Teacher(
        **adapter_of(folder), weights=str(folder / "base"), model=model_of(folder / "base")
    ),
}


def alone(teacher, run, mesh):
    """(model, parameters) of a teacher as commands load it, outside any run."""
    ref, model = teacher.weights or run.weights, teacher.model or run.model
    params = {"base": pretrained.load_frozen(ref, model, mesh, teacher.quant)}
    if teacher.start:
        params["adapter"], _ = adapter_folders.load_adapter(f"{teacher.start}/adapter", model, mesh, ref)
    return adapted(model, teacher.adapter), params


@pytest.mark.quick_cases("an adapter", "quantised")
@pytest.mark.parametrize("kind", TEACHERS)
def test_the_reference_is_the_teacher_and_steps_leave_it_as_it_is_bit_for_bit(folder, kind):
    run = run_of(folder, teacher=TEACHERS[kind](folder))
    p, state, frozen, batch = started(run, folder)
    rows = jax.tree.map(lambda x: x[0], batch)
    assert not jax.tree.leaves(state.aux)
    assert not any("teacher" in path for path in tree.paths(state.trainable))
    score = jax.jit(lambda trainable, frozen: p.objective.score(tree.combine(trainable, frozen), rows, {}))
    with jax.set_mesh(p.mesh):
        model, params = alone(run.teacher, run, p.mesh)
        expected = jax.jit(
            lambda params: (
                read_logps(model, params, model.hidden(params, rows)[0], (rows.read, rows.targets)).logp
            )
        )(params)
        known, before = score(state.trainable, frozen), jax.device_get(frozen)
        np.testing.assert_allclose(known.reference, expected, rtol=1e-10)
        losses = []
        for _ in range(2):
            state, found = p.train_step(state, frozen, batch)
            losses.append(metrics.as_floats(found)["loss"])
        after = score(state.trainable, frozen)
        resumed = start(run, p, state)[1]
    np.testing.assert_array_equal(after.reference, known.reference)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), before)
    assert losses[1] < losses[0] and np.abs(after.logps - known.logps).max() > 1e-3
    same = kind == "the base"
    assert (losses[0] == pytest.approx(math.log(2), rel=1e-12)) is same


def test_a_teacher_that_is_the_base_is_the_reference_of_a_fresh_adapter(folder):
    steps = []
    for run in (run_of(folder), run_of(folder, teacher=None, objective=partial(preference, loss=dpo))):
        p, state, frozen, batch = started(run, folder)
        with jax.set_mesh(p.mesh):
            for _ in range(2):
                state, found = p.train_step(state, frozen, batch)
        found = metrics.as_floats(found)
        found.pop("loss_at_reference", None)
        steps.append((found, jax.device_get(state.trainable["adapter"])))
    assert steps[0][0] == steps[1][0]
    jax.tree.map(np.testing.assert_array_equal, steps[0][1], steps[1][1])


def test_the_base_as_a_teacher_takes_no_memory_and_other_weights_what_they_are_stored_in(folder):
    def resident(teacher):
        return program_bytes.resident(build(run_of(folder, teacher=teacher), 10, jax.devices()[:1]))

    without = program_bytes.resident(
        build(run_of(folder, teacher=None, objective=partial(preference, loss=dpo)), 10, jax.devices()[:1])
    )
    assert resident(Teacher()) == {**without, "teacher": 0}
    model = model_of(folder / "other")
    own = {"weights": str(folder / "other"), "model": model}
    count = param_spec.count_params(model.specs)
    assert resident(Teacher(**own)) == {**without, "teacher": 8 * count}
    sizes = {
        path: math.prod(spec.shape) for path, spec in param_spec.spec_paths(model.specs["layers"]).items()
    }
    layers = sum(size for path, size in sizes.items() if "norm" not in path)
    packed = resident(Teacher(**own, quant=Quant("int8")))["teacher"]
    assert 0 <= packed - (8 * (count - layers) + layers) < 0.05 * packed  # scales


def test_a_penalty_may_be_on_the_kl_to_the_teacher(folder):
    run = run_of(folder, teacher=TEACHERS["weights"](folder))
    p, state, frozen, batch = started(run, folder)
    model = p.partition.model
    objective = policy(model, lambda batch: batch.logp, FixedKL(0.1, reference="teacher"), temperature=2.0)
    assert objective.facts.reference == "teacher" and objective.init(state.trainable, False) == {}
    rows = jax.tree.map(lambda x: x[0], batch)
    rows = dataclasses.replace(rows, lengths=rows.lengths.reshape(rows.lengths.shape[0], -1))

    @jax.jit
    def both(params):
        own = model.teacher
        h = own.hidden(params, rows)[0]
        logits = own.logits(own.head(params), jnp.take_along_axis(h, rows.read[:, :, None], 1)) / 2
        expected = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), rows.targets[:, :, None], -1)
        found = objective.score(params, rows, {})
        return found, expected[..., 0]

    with jax.set_mesh(p.mesh):
        found, expected = both(tree.combine(state.trainable, frozen))
    np.testing.assert_allclose(found.reference, expected, rtol=1e-10)


def test_an_objective_of_ones_own_reads_the_teacher(folder):
    seen = []

    def distil(model):
        def forward(params, batch, key, aux):
            seen.append(HeadInput(model.teacher, params, model.teacher.hidden(params, batch)[0]))
            return seen[-1].h

        return Objective(forward, lambda outputs, aux: (jnp.sum(outputs), {}), facts=Facts(teacher=True))

    p = build(run_of(folder, objective=distil, teacher=TEACHERS["weights"](folder)), 10, jax.devices()[:1])
    params = tree.combine(p.state.trainable, p.frozen)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), run_of(folder).data.abstract(1))
    assert jax.eval_shape(p.objective.forward, params, rows, None, {}).shape[-1] == 128


def test_the_fingerprint_of_a_run_has_its_teachers_weights(folder):
    def known(teacher):
        return weight_fingerprints(run_of(folder, teacher=teacher))

    base, adapter, own = (known(TEACHERS[kind](folder)) for kind in ("the base", "an adapter", "weights"))
    assert own == {**base, "teacher_fingerprint": own["teacher_fingerprint"]}
    assert adapter == {**base, "teacher_adapter_fingerprint": adapter["teacher_adapter_fingerprint"]}
    assert own["teacher_fingerprint"] != base["weights_fingerprint"]


def test_a_teacher_is_found_by_the_name_of_a_model_or_an_adapter(folder):
    base, build_model = str(folder / "base"), lambda ref: model_of(ref)
    assert find_teacher(base, base, build_model) == Teacher() == find_teacher(f"{base}/", base, build_model)
    own = find_teacher(str(folder / "other"), base, build_model, Quant("nf4"))
    assert (own.weights, own.model.config.width, own.quant.kind) == (str(folder / "other"), 128, "nf4")
    assert find_teacher(base, base, build_model, shares=False).weights == base
    with pytest.raises(ValueError, match="shares the run's base"):
        find_teacher(base, base, build_model, Quant("nf4"))


def with_other_token(folder):
    """A copy of other/ whose tokenizer has another token in place of one."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "other")
    text = tokenizer.backend_tokenizer.to_str().replace('"!":', '"?!?":')
    write_folder(folder / "foreign", tiny_torch(1))
    (folder / "foreign" / "tokenizer.json").write_text(text)
    return Teacher(weights=str(folder / "foreign"), model=model_of(folder / "foreign"))


def without_weights(folder):
    write_folder(folder / "empty", tiny_torch(1))
    (folder / "empty" / "model.safetensors").unlink()
    return Teacher(weights=str(folder / "empty"), model=model_of(folder / "empty"))


def small(folder):
    write_folder(folder / "small", tiny_torch(1, vocab_size=258))
    return Teacher(weights=str(folder / "small"), model=model_of(folder / "small"))


@pytest.mark.parametrize(
    "make, message",
    [
        (with_other_token, "foreign has other tokens than .*base: '!' is token 0 here and no token there"),
        (without_weights, "empty: no .*safetensors|empty.* has no weights|empty"),
        (small, "small: the tokenizer produces token id 300, but the model has embeddings for 0 to 257"),
    ],
)
def test_a_teacher_of_other_tokens_or_without_weights_is_refused(folder, make, message):
    run = run_of(folder, teacher=make(folder))
    with pytest.raises((ValueError, OSError), match=message) as refused:
        check_teacher_files(run, pretrained.load_tokenizer(run.weights), 300)
    assert "\n" not in str(refused.value)


SFT_DPO = partial(preference, loss=dpo)
REFUSED = {
    "reads no second model": {"objective": SFT_DPO},
    "but run.teacher=none; set it in the recipe": {"teacher": None},
    "shares the run's base, which is trained": {"adapter": None},
    "changes the base that the teacher shares": {"adapter": Adapter(rank=4, init="pissa")},
    "is beyond the 32 positions of the teacher": {"teacher": "short"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_do_not_go_with_a_teacher_are_refused(folder, message):
    changes = dict(REFUSED[message])
    if changes.get("teacher") == "short":
        model = model_of(folder / "other")
        config = dataclasses.replace(model.config, max_positions=32)
        changes["teacher"] = Teacher(
            weights=str(folder / "other"), model=dataclasses.replace(model, config=config)
        )
    if "changes the base" in message:
        changes["teacher"] = TEACHERS["an adapter"](folder)
    with pytest.raises(ValueError, match=message):
        build(run_of(folder, **changes), 10, jax.devices()[:1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"start": "runs/sft"}, "teacher.start and teacher.adapter belong together"),
        ({"weights": "org/name"}, "teacher.weights and teacher.model belong together"),
        ({"quant": Quant("nf4")}, "teacher.quant=nf4 needs teacher.weights"),
        (
            {"weights": "w", "model": llama(CONFIG, jnp.float32), "quant": Quant("nf4", calibrate="run")},
            "only the run's own base is calibrated",
        ),
    ],
)
def test_a_teachers_settings_belong_together(settings, message):
    with pytest.raises(ValueError, match=message):
        Teacher(**settings)


def test_a_sweep_refuses_a_teacher(folder):
    with pytest.raises(ValueError, match=r"leave out .* run.teacher"):
        Sweep("some", {"a": run_of(folder)})


def test_a_teacher_without_room_is_one_line(folder, monkeypatch):
    def full(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")

    run = run_of(folder, teacher=TEACHERS["weights"](folder))
    monkeypatch.setattr(pretrained, "load_frozen", full)
    with pytest.raises(MemoryError, match="other does not fit into .* leaves; quantise it") as refused:
        load_teacher(run.teacher, run, sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))
    assert "\n" not in error_line(refused.value)


def test_the_log_names_the_second_model(folder):
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    lines = [teacher_lines(run_of(folder, teacher=make(folder)), mesh) for make in TEACHERS.values()]
    assert lines[0] == ["second model, frozen: the run's base without an adapter, at no memory"]
    assert lines[1] == [f"second model, frozen: the run's base with the adapter {folder / 'sft'}"]
    assert (
        "other, " in lines[2][0]
        and "in nf4" in lines[3][0]
        and teacher_lines(run_of(folder, teacher=None), mesh) == []
    )


def test_the_plan_counts_the_teachers_forward_pass(folder):
    def counted(run):
        p, batch = programs.abstract(run, jax.devices()[:1])
        with jax.set_mesh(p.mesh):
            traced = p.train_step.trace(p.state, p.frozen, batch)
            return plan.flops(run, p, batch, traced), batch

    alone = partial(preference, loss=simpo, reference=None, reward=mean_logp)
    without, batch = counted(run_of(folder, teacher=None, objective=alone))
    run = run_of(folder, teacher=TEACHERS["weights"](folder))
    reads, length = math.prod(batch.read.shape), batch.ids.shape[-1]
    more = run.teacher.model.forward_flops(without.slots, length, reads)
    assert counted(run)[0].model == pytest.approx(without.model + more, rel=1e-6)
    assert counted(run_of(folder))[0].model == pytest.approx(1.5 * without.model, rel=1e-6)


def test_a_layer_of_the_second_model_that_is_not_finite_is_named(folder):
    run = run_of(folder, teacher=Teacher(weights=str(folder / "other"), model=model_of(folder / "other")))
    p, state, frozen, batch = started(run, folder)
    mlp = frozen["teacher"]["base"]["layers"]["mlp"]
    mlp["up"] = mlp["up"].at[1].set(1e300)
    observe = make_layer_outputs(p.partition.model, run.objective, None)
    own, others = jax.device_get(
        jax.jit(observe)(state.trainable, frozen, sharding.shard_batch(p.mesh, batch), state.aux)
    )
    text, bad = first_output(own, others)
    assert text == "the first output that is not finite belongs to layer 1 of the second model"
    assert bad.all() and np.isfinite(own[0]).all() and own[0].shape[1] == 4 and others[0].shape[1] == 3
