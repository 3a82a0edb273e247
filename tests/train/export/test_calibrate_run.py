"""Runs on a base that they calibrate themselves: codes, cache, resuming, corrections, errors."""

import json
import runpy
import shutil
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading_process import one_device
from prepared import prepare, resume, working_directory
from scripts_in_process import call
from tiny_run import ROOT, Place, write_place, write_rows

from jaxft.data.pairs import PairRows
from jaxft.data.sft import Rows
from jaxft.distributed import sharding
from jaxft.nn import tree
from jaxft.nn.quant import Quant, dequantize, is_qtensor
from jaxft.runs import run_record, terminal
from jaxft.train.export import calibrate
from jaxft.train.export.calibrate import calibrate_base, rows_of_source
from jaxft.train.start import jobs
from jaxft.weights import pretrained
from jaxft.weights.edit import calibrated_base

SHORT = ["samples=0", "quant=nf4", "quant.block=32"]
NF4 = [*SHORT, "quant.calibrate_tokens=640"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate-run")
    write_place(folder)
    texts = [{"text": f"{i} and {i} are {2 * i}, or so they say"} for i in range(60)]
    write_rows(folder / "texts.jsonl", texts)
    return Place(folder)


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(place.folder / "cache"))


def loaded(place, *overrides, lines=None):
    """(job, frozen parameters) of a run that begins; its progress goes into `lines`."""
    job = prepare(place.folder, *NF4, *overrides)
    (place.folder / job.folder).mkdir(parents=True, exist_ok=True)
    with working_directory(place.folder), jax.set_mesh(sharding.make_mesh(job.lead.run.mesh)):
        report = [].append if lines is None else lines.append
        calibrate_base(job.calibration, place.folder / job.folder, report)
        states, frozen = jobs.load_members(job, None, report)
        return job, states[0].trainable, frozen[0]


def other_rows(place):
    """Held-out rows, on which the base is not calibrated."""
    source = prepare(place.folder, *NF4, "name=rows").sources[0]
    return jax.tree.map(lambda x: jnp.asarray(x[0]), source.held_out[0])


def layers(base):
    return {path: q for path, q in tree.paths(base, is_qtensor).items() if is_qtensor(q) and q.kind == "nf4"}


@pytest.mark.slow
def test_the_base_of_a_run_has_the_bits_that_quantize_py_writes_for_the_same_rows(
    place, monkeypatch, capsys, tmp_path
):
    rows = ["--calibrate", str(place.folder / "texts.jsonl"), "--tokens", "640", "--max-length", "64"]
    argv = ["--model", str(place.folder / "base"), "--out", str(tmp_path / "out"), "--block", "32", *rows]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *argv])
    main = runpy.run_path(str(ROOT / "scripts" / "quantize.py"))["main"]
    assert terminal.one_line_errors(main) == 0, capsys.readouterr().err
    shutil.rmtree(place.folder / "cache" / calibrated_base.CALIBRATED)  # computed again
    lines = []
    job, _, frozen = loaded(place, "quant.calibrate=texts.jsonl", "name=file", lines=lines)
    assert lines[0] == "calibrated layer 1 of 3" and "computed in" in lines[-1]
    model = pretrained.model_for(str(tmp_path / "out"))
    written = pretrained.load_frozen(str(tmp_path / "out"), model, one_device(), Quant("checkpoint"))
    found, expected = layers(frozen["base"]), layers(written)
    assert found.keys() == expected.keys() and len(found) == 7
    for path in found:
        jax.tree.map(np.testing.assert_array_equal, found[path].codes, expected[path].codes)
        for name in ("scale", "outer", "mean"):
            np.testing.assert_array_equal(getattr(found[path], name), getattr(expected[path], name))


@pytest.mark.slow
def test_a_second_start_takes_the_codes_from_the_cache_and_others_are_refused(place, monkeypatch):
    first, _, frozen = loaded(place, "quant.calibrate=run", "name=twice")
    assert first.members[0].record["quant"]["codes"] == first.calibration.name
    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "calibrate_layers", None)  # not called
        again, _, same = loaded(place, "quant.calibrate=run", "name=twice", lines=lines)
    assert again.calibration.name == first.calibration.name and "from the cache" in lines[-1]
    jax.tree.map(np.testing.assert_array_equal, frozen, same)
    other = prepare(place.folder, *NF4, "quant.calibrate=run", "quant.double=false", "name=other")
    assert other.calibration.name != first.calibration.name
    file = calibrated_base.codes_folder(first.calibration.name) / "layer-00001.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    lines.clear()
    _, _, same = loaded(place, "quant.calibrate=run", "name=twice", lines=lines)
    assert "is damaged" in lines[0] and str(file) in lines[0] and "computed in" in lines[-1]
    jax.tree.map(np.testing.assert_array_equal, frozen, same)
    assert file.read_bytes() == before
    record = place.folder / first.folder / "calibrated.json"
    record.write_text(record.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(ValueError, match="differs from the one that this run started with"):
        loaded(place, "quant.calibrate=run", "name=twice")


def test_calibration_rows_are_the_same_for_any_layout_of_the_batches_and_number_of_epochs(place):
    write_rows(
        place.folder / "pairs.jsonl",
        [{"prompt": f"what is {i} plus {i}?", "chosen": f"it is {2 * i}" + " or so" * (i % 5),
          "rejected": "never mind"} for i in range(40)],
    )  # fmt: skip
    tokenizer = pretrained.load_tokenizer(str(place.folder / "base"))
    for settings, layouts in ((PairRows, ["branches", "plain"]), (Rows, [None])):
        data = settings(str(place.folder / "pairs.jsonl"), format="plain", batch=8, max_length=64)
        if settings is Rows:
            data = replace(data, train=str(place.folder / "texts.jsonl"))

        def found(shards=1, data=data, tokens=700, **changes):
            source = replace(data, **changes).open(tokenizer, shards)
            return rows_of_source(source, tokens, "rows")

        expected = found()
        assert 700 <= expected.tokens < 764
        others = [found(4), found(micro=2), found(epochs=3.0), found(epochs=0.1)]
        others += [found(layout=layout) for layout in layouts if layout]
        assert {x.digest for x in others} == {expected.digest}
        assert found(seed=1).digest != expected.digest


def test_sequences_share_rows_and_are_numbered():
    rows = calibrate._packed([np.full(length, length) for length in (30, 20, 40)])
    assert rows.ids.shape == (2, 64) and rows.tokens == 90
    assert rows.segments[0].tolist() == [1] * 30 + [2] * 20 + [0] * 14
    assert rows.positions[0].tolist() == [*range(30), *range(20)] + [0] * 14
    assert rows.ids[1, :40].tolist() == [40] * 40 and rows.ids[1, 40:].max() == 0


def test_a_calibration_file_is_read_and_rendered_as_the_runs_own_rows(place):
    asked = [{"question": f"what is {i} plus {i}?", "answer": f"it is {2 * i}"} for i in range(40)]
    write_rows(place.folder / "asked.jsonl", [*asked, {"question": "and this?"}])
    own = ["data.columns=prompt=question,completion=answer", "data.invalid=drop"]
    job = prepare(place.folder, *NF4, "quant.calibrate=asked.jsonl", "data=asked.jsonl", *own, "name=asked")
    assert job.calibration.rows.tokens >= 640
    changes = {"date": "1 May 2025", "system": "merge", "format": "auto"}
    run = replace(job.lead.run, data=replace(job.lead.run.data, **changes, columns=(), invalid_limit=0.5))
    rows = replace(calibrate._as_in_run(run, run.quant), rows=str(place.folder / "texts.jsonl"))
    settings = rows.open(job.tokenizer, 1, print).settings
    assert settings.template_settings == run.data.template_settings
    assert (settings.invalid, settings.invalid_limit) == ("drop", 0.5)


def test_calibrated_layers_are_closer_to_the_exact_model_than_rounded_ones_on_other_rows(place):
    _, _, frozen = loaded(place, "quant.calibrate=run", "name=closer")
    model = pretrained.model_for(str(place.folder / "base"), dtype=jnp.float32)
    bases = {kind: pretrained.load_frozen(str(place.folder / "base"), model, one_device(), quant)
             for kind, quant in (("exact", None), ("plain", Quant("nf4", 32)))}  # fmt: skip
    bases["calibrated"] = frozen["base"]
    tokens = other_rows(place)
    h = {kind: np.asarray(model.hidden(base, tokens)[0]) for kind, base in bases.items()}
    used = np.asarray(tokens.segments) > 0
    off = {kind: np.square(h[kind] - h["exact"])[used].mean() for kind in ("plain", "calibrated")}
    assert 0 < off["calibrated"] < 0.7 * off["plain"]


def test_qera_starts_from_the_corrections_and_is_closer_to_the_exact_model_than_rounding(place):
    job, trainable, frozen = loaded(place, "quant.calibrate=run", "adapter.init=qera", "name=qera")
    model, tokens = job.lead.run.model, other_rows(place)
    pairs = tree.paths(tree.combine(trainable, frozen)["adapter"])
    for path in ("layers/attn/q", "layers/mlp/down"):
        a, b, scale = (np.asarray(pairs[f"{path}/{name}"]) for name in ("a", "b", "scale"))
        for layer in range(3):
            name = model.weight_names[path][0].format(i=layer)
            first, second = calibrated_base.read_correction(job.calibration.name, name)
            assert np.abs(first @ second).max() > 1e-3
            np.testing.assert_allclose(scale[layer] * a[layer] @ b[layer], first @ second, atol=1e-5)
    full = job.lead.programs.partition.model
    h = {"qera": full.hidden(tree.combine(trainable, frozen), tokens)[0]}
    for kind, quant in (("exact", None), ("nearest", Quant("nf4", 32))):
        base = pretrained.load_frozen(str(place.folder / "base"), model, one_device(), quant)
        h[kind] = model.hidden(base, tokens)[0]
    off = {kind: float(jnp.mean(jnp.square(h[kind] - h["exact"]))) for kind in ("qera", "nearest")}
    assert 0 < off["qera"] < 0.9 * off["nearest"]
    assert job.lead.run.adapter.exported.rank == 8  # for the unchanged base, see test_adapter_kinds.py


@pytest.mark.slow
def test_a_calibrated_run_resumes_and_its_commands_use_its_codes(place, monkeypatch, capsys):
    environment = {"JAXFT_CACHE": str(place.folder / "cache")}
    argv = [*NF4, "quant.calibrate=run", "name=whole", "lr=0.03"]
    assert place.run(*argv, "steps=2", **environment) == 0, place.err()
    assert "% of the base in nf4" in place.out() and ", calibrated" in place.out()
    assert "calibrated base: nf4 on " in place.out()
    assert ", calibrated" in (place.runs("whole") / "README.md").read_text()
    assert place.run(*argv, "steps=3", **environment) == 0, place.err()
    assert "from the cache" in place.out()
    with pytest.raises(ValueError, match=r"quant.calibrate: 'run' -> 'texts.jsonl'"):
        resume(place.folder, *NF4, "quant.calibrate=texts.jsonl", "name=whole", "lr=0.03", "steps=3")
    record = json.loads((place.runs("whole") / "config.json").read_text())
    ref, _, _ = run_record.trained_weights(place.runs("whole"))
    monkeypatch.chdir(place.folder)
    model = pretrained.model_for(ref, dtype=jnp.float32)
    base = pretrained.load_frozen(ref, model, one_device(), Quant(**record["quant"]))
    stored = calibrated_base.open_codes(record["quant"]["codes"])["model.layers.1.mlp.up_proj.weight"].read()
    np.testing.assert_array_equal(base["layers"]["mlp"]["up"].codes[1], stored.codes)
    out = place.folder / "merged"
    code, text, err = call(monkeypatch, capsys, "export", "--run", place.runs("whole"), "--out", out)
    assert code == 0 and "base as nf4 with" in text, err
    generate = ("generate", "--run", place.runs("whole"), "--prompt", "x", "--max-new", "2")
    file = calibrated_base.codes_folder(record["quant"]["codes"]) / "layer-00001.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    for command in (generate, ("export", "--run", place.runs("whole"), "--out", place.folder / "damaged")):
        code, _, err = call(monkeypatch, capsys, *command)
        assert code == 1 and "has changed since this run was trained. Start the run's command" in err
    assert place.run(*argv, "steps=3", **environment) == 0 and "is finished" in place.out()
    assert "is damaged" in place.out() and file.read_bytes() == before
    shutil.rmtree(place.folder / "cache" / calibrated_base.CALIBRATED)
    code, _, err = call(monkeypatch, capsys, *generate)
    assert code == 1 and "the calibrated base of this run is not in the cache" in err
    assert dequantize(stored).shape == (64, 96)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quant.calibrate=few.jsonl"], "quant.calibrate=few.jsonl|few.jsonl: its rows have .* too few"),
        (
            ["quant.calibrate=texts.jsonl", "quant.calibrate_tokens=8"],
            "fewer than one row of 64 .*data.max_length",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused_before_anything_is_written(place, argv, message):
    write_rows(place.folder / "few.jsonl", [{"text": "a few words"}])
    with pytest.raises(ValueError, match=message):
        prepare(place.folder, *SHORT, *argv, "name=refused")
    assert not place.runs("refused").exists()
