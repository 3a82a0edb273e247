"""Studies on a tiny model: declared, halved, killed and continued; what a declaration refuses."""

import contextlib
import hashlib
import shutil
from contextlib import chdir
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dpo_place import write_pair_place
from prepared import working_directory

from jaxft.lab.loss_evaluation import loss_beta
from jaxft.lab.studies import halving, trial_arrays
from jaxft.lab.studies.appendix import REPORT, write_appendix
from jaxft.lab.studies.study import LogRange, LossTrial, SearchedLoss, Study, load_study
from jaxft.lab.studies.study_results import read_study
from jaxft.lab.studies.verify import record_problems
from jaxft.objectives.losses.preference_losses import cdpo, dpo, ipo
from jaxft.objectives.losses.reference_free_losses import bco
from jaxft.objectives.metrics import Sum
from jaxft.report.ranking import read_held_out
from jaxft.runs.metrics_log import digests_path, read_entries, read_unfinished
from jaxft.runs.settings.config import load_config
from jaxft.train import loop
from jaxft.train.compiled import HeldOutValues
from jaxft.train.export.finished_run import write_held_out

EXAMPLE = Path(__file__).parents[2] / "configs/examples/four_losses.py"
FILE = '''"""A study of two losses."""

from jaxft.lab.studies.study import LogRange, SearchedLoss, Study
from jaxft.objectives.losses.preference_losses import dpo, ipo
from jaxft.runs.metrics_log import read_unfinished
from jaxft.runs.settings.config import load_config


def study() -> Study:
    return Study(
        name="tiny",
        recipe=load_config("config.py", ["steps=9", "held_out=0.5", "micro=2"]),
        losses={
            "dpo": SearchedLoss(dpo, {"beta": LogRange(0.03, 0.3)}),
            "ipo": SearchedLoss(ipo, {"beta": (0.05, 0.1)}),
        },
        evaluations=2,
        lr=LogRange(1e-3, 2e-2),
        trials=3,
        seeds=(0, 1),
    )
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_pair_place(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(place):
    with chdir(place):
        return load_config("config.py", ["steps=9", "held_out=0.5"])


def run(place, text=FILE, name="study.py"):
    (place / name).write_text(text)
    with working_directory(place):
        return halving.run_study(*load_study(name))


class Killed(Exception):
    pass


def die_at(step):
    """A step program that dies at a call."""
    calls = 0

    def wrap(compiled):
        def step_or_die(*args):
            nonlocal calls
            calls += 1
            if calls == step:
                raise Killed
            return compiled.step(*args)

        return replace(compiled, step=step_or_die)

    return wrap


def files_of(folder):
    kept = (p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".csv"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if "checkpoints" not in p.parts}


@pytest.mark.slow
def test_a_trial_has_the_metrics_of_a_run_with_its_settings(place):
    """Knobs and learning rates that are arrays are those that a run has as settings."""
    text = FILE.replace('name="tiny"', 'name="alone"').replace("seeds=(0, 1)", "seeds=(0,), keep=1.0")
    text = text.replace("evaluations=2", "evaluations=3")
    assert run(place, text, "alone.py") == 0
    with working_directory(place):
        study, _ = load_study("alone.py")
        for label in study.losses:
            trial = study.trials_of(label)[2]
            settings = replace(trial_arrays.plain_run(study, label, trial, 0), name=f"alone-{label}")
            settings = replace(settings, loop=replace(settings.loop, eval_every=3))
            assert loop.run(settings) == 0
            entries = read_entries(place / f"runs/alone-{label}/metrics.jsonl")
            expected = {entry["step"]: entry for entry in entries if "eval_loss" in entry}
            found = read_entries(place / f"runs/alone/trials/{label}-2-seed0/metrics.jsonl")
            assert [e["step"] for e in found] == [3, 6, 9]
            for entry in found:
                for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_kl"):
                    value = expected[entry["step"]][name]
                    assert entry[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (label, name)


@pytest.mark.slow
def test_a_loss_with_a_state_has_it_in_each_slot_from_the_start_of_each_trial(place):
    """BCO's trials, the last one after two others in its slot, are runs with its beta."""
    text = FILE.replace('name="tiny"', 'name="bco"').replace("seeds=(0, 1)", "seeds=(0,), keep=1.0")
    text = text.replace('"ipo": SearchedLoss(ipo,', '"bco": SearchedLoss(bco,')
    bco_import = "from jaxft.objectives.losses.reference_free_losses import bco\n"
    text = text.replace("import dpo, ipo\n", f"import dpo\n{bco_import}")
    text = text.replace("evaluations=2", "evaluations=3")
    assert run(place, text, "bco.py") == 0
    with working_directory(place):
        study, _ = load_study("bco.py")
        trial = study.trials_of("bco")[2]
        settings = replace(trial_arrays.plain_run(study, "bco", trial, 0), name="bco-alone")
        assert loop.run(replace(settings, loop=replace(settings.loop, eval_every=3))) == 0
    entries = read_entries(place / "runs/bco-alone/metrics.jsonl")
    expected = {entry["step"]: entry for entry in entries if "eval_loss" in entry}
    found = read_entries(place / "runs/bco/trials/bco-2-seed0/metrics.jsonl")
    assert [entry["step"] for entry in found] == [3, 6, 9]
    for entry in found:
        alone = expected[entry["step"]]
        assert entry["eval_loss"] == pytest.approx(alone["eval_loss"], rel=2e-3)
        margin = trial.knobs["beta"] * entry["eval_rewards/margins"]
        assert margin == pytest.approx(alone["eval_rewards/margins"], rel=2e-3, abs=2e-4)


def test_the_state_of_a_loss_is_updated_from_rewards_with_its_own_beta():
    loss, trial = SearchedLoss(bco, {"beta": (0.3,)}), LossTrial(0, 1e-3, {"beta": 0.3})
    objective = trial_arrays.searched(None, loss, trial)
    aux = objective.init({}, True)
    metrics = {"rewards/chosen": Sum(jnp.float32(6), jnp.float32(3)), "rewards/rejected": Sum(-2.0, 3.0)}
    state = objective.update(aux, {}, metrics)["loss"]  # 3 rewards of 2 nats and 3 of -2/3
    assert state["delta"] == pytest.approx(0.3 * (6 - 2) / 6) and state["count"] == 6
    assert loss_beta(partial(bco, beta=0.7), 1.0) == 0.7
    assert loss_beta(lambda pair: pair, 1.0) == 1.0


@pytest.mark.slow
def test_a_killed_study_is_continued_bit_for_bit_and_compiles_nothing_between_trials(
    place, monkeypatch, capsys
):
    compile_sweep, compiles = halving.compile_sweep, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiles.append(name) if "backend_compile" in name else None
    )
    monkeypatch.setattr(halving, "compile_sweep", lambda *args: die_at(12)(compile_sweep(*args)))
    with pytest.raises(Killed):
        run(place)
    done = read_unfinished(place / "runs/tiny/study.jsonl")
    monkeypatch.setattr(halving, "compile_sweep", compile_sweep)
    write_trial = halving.write_trial

    def die_in_the_last_stage(lab, folder, wave, label, *result):
        if wave.first and label == "ipo":  # the other loss has its new checkpoint, the log has no line
            raise Killed
        return write_trial(lab, folder, wave, label, *result)

    monkeypatch.setattr(halving, "write_trial", die_in_the_last_stage)
    with pytest.raises(Killed):
        run(place)
    monkeypatch.setattr(halving, "write_trial", write_trial)
    train_wave = halving.train_wave
    after_first = []

    def counted(*args):
        found = train_wave(*args)
        after_first.append(len(compiles))
        return found

    monkeypatch.setattr(halving, "train_wave", counted)
    assert run(place) == 0
    assert len(set(after_first[-3:])) == 1  # later waves compile nothing
    out = capsys.readouterr().out
    assert "each of 2 losses: 3 trials on seed 0 (3 to step 3, then 1 to step 9)" in out
    assert "5 of 5, seed 1, steps 0-9: dpo-" in out
    entries = read_unfinished(place / "runs/tiny/study.jsonl")
    assert entries[: len(done)] == done and len(done) > 2  # no finished trial is lost
    continued = files_of(place / "runs/tiny")
    shutil.move(place / "runs/tiny", place / "continued")
    assert run(place) == 0
    assert files_of(place / "runs/tiny") == continued

    study = read_study(place / "runs/tiny")
    assert [len(e["trials"]) for e in entries if "wave" in e] == [2] * 5
    assert {p.name for p in write_appendix(study)} >= {REPORT, "duels.csv", "losses.tex"}
    page = (place / "runs/tiny" / REPORT).read_text()
    for text in (study.declaration["digest"], "Comparisons", "not distinguishable", "data:image/png"):
        assert text in page
    assert run(place) == 0 and "this study is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the study has changed since it was declared: study.trials: 3 -> 2"):
        run(place, FILE.replace("trials=3", "trials=2"))
    problems_of_a_study(place / "runs/tiny")


def problems_of_a_study(folder):
    """Changes of a finished study, each of which is one line."""
    assert not [*record_problems(folder)]
    page, table, log = (folder / name for name in (REPORT, "tables/duels.csv", "study.jsonl"))
    trial = next(folder.glob("trials/*/evaluations.jsonl"))
    manifest = next(folder.glob("trials/*-seed1/checkpoints/*/manifest.json"))
    stored = max(
        (manifest.parent / "state").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size
    )
    for path, change, message in (
        (page, lambda x: x.replace(b"not distinguishable", b"better", 1), "differs from what jaxft"),
        (table, lambda x: x.replace(b"dpo", b"ipo", 1), "differs from what jaxft"),
        (trial, lambda x: x.replace(b"0.", b"1.", 1), "the file was changed after it was written"),
        (log, lambda x: x.replace(b"0.", b"1.", 1), "the line was changed after it was written"),
        (log, lambda x: x.replace(b"{", b"", 1), "study.jsonl:1: the line was changed"),  # no JSON
        (folder / "declaration.json", lambda x: x.replace(b"  ", b" ", 1), "its spaces or the order"),
        (manifest, lambda x: x.replace(b'"step"', b'"stop"', 1), "checkpoints/9"),
        (stored, lambda x: x[:-9] + bytes([x[-9] ^ 1]) + x[-8:], "checkpoints/9"),
    ):
        content = path.read_bytes()
        assert change(content) != content
        path.write_bytes(change(content))
        (problem,) = record_problems(folder)
        assert message in problem and "\n" not in problem
        path.write_bytes(content)
    digests = digests_path(log)
    for path in (log, digests):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    (problem,) = record_problems(folder)
    assert problem.endswith("its last lines were removed")


def test_a_study_whose_file_changed_after_its_declaration_is_refused_in_one_line(place, recipe, monkeypatch):
    """What has changed is named before anything is loaded; so is a change of the declaration itself."""
    monkeypatch.setattr(halving, "open_lab", lambda *_: (_ for _ in ()).throw(Killed))
    study, file = make(recipe, name="declared"), place / "config.py"
    path = place / "runs/declared/declaration.json"
    with working_directory(place):
        with pytest.raises(Killed):  # the declaration is written, nothing is trained
            halving.run_study(study, file)
        for other, message in (
            (replace(study, trials=5), "since it was declared: study.trials: 6 -> 5"),
            (
                replace(study, metric="rewards/margins"),
                "'rewards/accuracies' -> 'rewards/margins'",
            ),
            (replace(study, losses={**study.losses, "ipo": SearchedLoss(partial(ipo, beta=0.2))}), "ipo"),
        ):
            with pytest.raises(ValueError, match="has changed since") as error:
                halving.run_study(other, file)
            assert message in str(error.value) and "\n" not in str(error.value)
        path.write_text(path.read_text().replace('"rewards/accuracies"', '"rewards/margins"', 1))
        with pytest.raises(ValueError, match="declaration.json was edited after the study was") as error:
            halving.run_study(study, file)
        assert "\n" not in str(error.value)


def test_a_checkpoint_is_there_until_the_log_has_the_next_one(tmp_path):
    """A wave that is killed while its results are written is repeated from the checkpoint before it."""
    with contextlib.closing(halving.checkpoints_of(tmp_path)) as saved:
        for step in (3, 9, 27):
            saved.save(step, {"x": jnp.full(2, step)}, {})
        saved.wait()
        assert saved.steps() == [9, 27]


def test_a_wave_goes_on_only_from_the_files_that_the_log_has(tmp_path):
    log = tmp_path / halving.EVALUATIONS
    with contextlib.closing(halving.checkpoints_of(tmp_path)) as saved:
        saved.save(3, {"x": jnp.ones(2)}, {})
    log.write_text('{"step": 1}\n{"step": 3}\n')
    files = {log.name: hashlib.sha256(log.read_bytes()).hexdigest()}
    state = halving.state_sha256(tmp_path / "checkpoints/3")
    wave = {"steps": [0, 3], "files": {"dpo": files}, "states": {"dpo": state}}
    log.write_text('{"step": 1}\n{"step": 3}\n{"step": 9}\n')  # of a killed wave
    halving.check_earlier(tmp_path, wave, "dpo")
    with contextlib.closing(halving.checkpoints_of(tmp_path)) as saved:
        saved.save(3, {"x": jnp.zeros(2)}, {})
    with pytest.raises(ValueError, match="checkpoints/3: the checkpoint was changed after it was written"):
        halving.check_earlier(tmp_path, wave, "dpo")
    log.write_text('{"step": 1, "x": 1}\n{"step": 3}\n')
    with pytest.raises(ValueError, match="evaluations.jsonl: the file was changed after it was written"):
        halving.check_earlier(tmp_path, wave, "dpo")


def make(recipe, **more):
    losses = {"dpo": SearchedLoss(dpo, {"beta": LogRange(0.03, 0.3)}), "ipo": SearchedLoss(ipo)}
    return Study(**{"name": "x", "recipe": recipe, "losses": losses, "lr": LogRange(1e-5, 1e-3), **more})


def test_a_third_of_the_trials_trains_on_for_three_times_as_long(recipe):
    study = make(recipe, trials=9)
    assert [(r.trials, r.steps) for r in study.rungs] == [(9, 1), (3, 3), (1, 9)]
    assert study.steps_per_loss == 9 * 1 + 3 * 2 + 1 * 6 + 2 * 9
    assert [(r.trials, r.steps) for r in make(recipe, trials=4, keep=1.0).rungs] == [(4, 9)]
    assert make(recipe, trials=1).steps_per_loss == 3 * 9


def test_a_study_takes_at_most_035_of_the_steps_of_the_full_grid(recipe):
    recipe = replace(recipe, loop=replace(recipe.loop, steps=27))
    for trials, seeds in ((6, (0, 1, 2)), (9, (0, 1, 2)), (9, (0,)), (27, (0, 1, 2, 3, 4))):
        study = make(recipe, trials=trials, seeds=seeds)
        assert study.steps_per_loss <= 0.35 * trials * len(seeds) * 27


def test_every_loss_has_the_same_number_of_trials_and_the_same_learning_rates(recipe):
    study = make(recipe, trials=6)
    trials = {label: study.trials_of(label) for label in study.losses}
    assert [t.lr for t in trials["dpo"]] == [t.lr for t in trials["ipo"]] and len(trials["dpo"]) == 6
    logs = np.log10([t.lr for t in trials["dpo"]])
    assert logs.min() >= -5 and logs.max() <= -3 and np.histogram(logs, 2)[0].tolist() == [3, 3]
    betas = {t.knobs["beta"] for t in trials["dpo"]}
    assert len(betas) == 6 and not trials["ipo"][0].knobs
    listed = make(recipe, lr=(1e-4, 1e-3), losses={"a": SearchedLoss(dpo), "b": SearchedLoss(ipo)}, trials=2)
    assert [t.lr for t in listed.trials_of("a")] == [1e-4, 1e-3]


WRONG = {
    "no trial": (dict(trials=0), "study.trials=0"),
    "one loss": (dict(losses={"dpo": SearchedLoss(dpo)}), "has 1 losses; a comparison needs at least 2"),
    "knob": (dict(losses={"a": SearchedLoss(dpo, {"bta": (1.0,)}), "b": SearchedLoss(ipo)}), "no knob 'bta'"),
    "seed twice": (dict(seeds=(0, 0)), "study.seeds=(0, 0): expected a tuple of different seeds"),
    "metric": (dict(metric="loss"), "study.metric='loss'; use one of rewards/accuracies, rewards/margins"),
    "few values": (
        dict(lr=(1e-4,), losses={"a": SearchedLoss(dpo), "b": SearchedLoss(ipo)}),
        "study.trials=6, but a has only 1 settings",
    ),
    "range": (dict(lr=(0.1,), tuning=1.0), "study.tuning=1.0; expected above 0 and below 1"),
    "a stage without a step": (
        dict(trials=27),
        "trials=27, keep=0.333333: with loop.steps=9 the stages end at steps 1, 1, 3, 9, so that one has no "
        "step. Set loop.steps to 10 or more",
    ),
    "the same setting again": (dict(lr=LogRange(1e-4, 1e-4)), "study.trials=6, but ipo has only 1 settings"),
    "seeds": (dict(seeds=3), "study.seeds=3: expected a tuple of different seeds"),
    "a learning rate": (dict(lr=1e-4), "study: lr=0.0001; expected a LogRange, or a tuple of numbers"),
    "a negative learning rate": (dict(lr=(1e-4, -1e-4)), "study.lr=0.0001,-0.0001; expected above 0"),
    "a text": (
        dict(losses={"a": SearchedLoss(dpo, {"beta": ("0.1",)}), "b": SearchedLoss(ipo)}),
        "study.losses[a]: beta has the value '0.1'; use finite numbers",
    ),
    "a function": (
        dict(losses={"a": SearchedLoss(dpo, {"score": (1.0,)}), "b": SearchedLoss(ipo)}),
        "study.losses[a]: score is not a number and cannot be searched; set it with partial",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_study_that_cannot_be_compared_is_refused_in_one_line(recipe, kind):
    settings, message = WRONG[kind]
    with pytest.raises(ValueError) as error:
        make(recipe, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_without_pairs_steps_or_held_out_rows_is_refused(place):
    with chdir(place):
        for settings, message in (
            (["steps=none", "held_out=0.5"], "has loop.steps=None"),
            (["held_out=none"], "holds out no pairs"),
            (["full=true"], "must train a fresh adapter on pairs"),
            (["reference=moving"], "has a moving reference, but a study's reference is the policy at step 0"),
        ):
            with pytest.raises(ValueError, match=message):
                make(load_config("config.py", settings))
    with pytest.raises(ValueError, match="use finite numbers above 0, the lower one first"):
        LogRange(1.0, 0.1)


def gold_only(pair, beta=0.1):
    return beta * (pair.responses["gold"].logp - pair.chosen.logp)


def test_losses_that_need_other_rows_and_too_few_prompts_are_refused_before_anything_is_loaded(
    place, recipe, monkeypatch
):
    monkeypatch.setattr(halving, "open_lab", lambda *_: pytest.fail("weights are loaded"))
    other = make(recipe, name="gold", losses={"dpo": SearchedLoss(dpo), "gold": SearchedLoss(gold_only)})
    loud = SearchedLoss(cdpo, {"label_smoothing": (0.1, 0.9)})
    loud = make(recipe, name="loud", losses={"dpo": SearchedLoss(dpo), "cdpo": loud})
    few = make(replace(recipe, data=replace(recipe.data, held_out=0.04)), name="few")
    for study, message in (
        (other, r"study.losses\[gold\]: loss gold_only: the pairs have no field 'gold' "),
        (loud, r"study.losses\[cdpo\]: label_smoothing must be in \[0, 0.5\], got 0.9"),
        (few, "too few for any conclusion. Hold out more with data.held_out"),
    ):
        with working_directory(place), pytest.raises(ValueError, match=message):
            halving.run_study(study, place / "config.py")
        assert not (place / "runs" / study.name / "declaration.json").exists()


@pytest.mark.slow
def test_the_example_study_is_declared_on_the_shipped_pairs(tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(halving, "open_lab", stop)
    with working_directory(tmp_path), pytest.raises(KeyboardInterrupt):
        halving.run_study(*load_study(str(EXAMPLE)))
    out = capsys.readouterr().out
    assert "each of 4 losses: 6 trials on seed 0 (6 to step 3, then 2 to step 7, then 1 to step 20)" in out
    assert "24 held-out prompts select settings, 36 are compared" in out


def test_held_out_rows_of_one_name_are_refused_by_a_study_and_numbered_in_a_run(tmp_path):
    names = ["held.jsonl:1", "held.jsonl:2", "held.jsonl:1"]
    rows = SimpleNamespace(names=names)
    source = SimpleNamespace(split=SimpleNamespace(held=[0, 1, 2], rows=rows))
    with pytest.raises(ValueError, match="1 held-out rows have the name of another one"):
        halving.HeldOutPairs.of(source, 0.5)
    job = SimpleNamespace(
        sources=[SimpleNamespace(held_out_name=names.__getitem__)], members=[SimpleNamespace(folder=tmp_path)]
    )
    write_held_out(job, [HeldOutValues({2: {"loss": 0.3}, 0: {"loss": 0.1}, 1: {"loss": 0.2}}, {})])
    assert {name: values["loss"] for name, values in read_held_out(tmp_path).items()} == {
        "held.jsonl:1": 0.1, "held.jsonl:2": 0.2, "held.jsonl:1 (2)": 0.3,
    }  # fmt: skip
