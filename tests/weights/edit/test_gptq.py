"""Rounding that looks at a layer's inputs: their moments, the codes, and a base that is packed so."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from loading_process import one_device
from tiny_llama import some_tokens, tiny_torch, write_folder
from tiny_run import write_rows

from jaxft.nn import quant
from jaxft.nn.quant import Quant, quantize
from jaxft.nn.quant_formats import NF4
from jaxft.runs import terminal
from jaxft.train.export.calibrate import squared_inputs
from jaxft.weights import pretrained, storage
from jaxft.weights.edit import calibrated_rounding

ROOT = Path(__file__).resolve().parents[3]
FORMS = [("nf4", 16, True), ("nf4", 16, False), ("fp4", 16, False), ("int4", 16, None), ("affine4", 16, None),
         ("int8", None, None), ("fp8", None, None)]  # fmt: skip


def inputs(count=400, size=48, seed=0):
    """Inputs that go together, as a layer's do."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(12, size))
    return (rng.normal(size=(count, 12)) @ mixed + 0.3 * rng.normal(size=(count, size))).astype(np.float32)


def weight(ins=48, outs=40, seed=1):
    return np.random.default_rng(seed).normal(size=(ins, outs)).astype(np.float32)


def value(q):
    return np.asarray(quant.dequantize(q), np.float64)


# Codes


def by_gptq(w, moment, *form):
    """A weight with the scales of plain rounding and GPTQ's codes."""
    plain = quantize(w, *form)
    factor = calibrated_rounding.inverse_factor(jnp.asarray(moment))
    return calibrated_rounding.with_codes(
        plain, calibrated_rounding.gptq_codes(jnp.asarray(w), factor, plain, form[0])
    )


@pytest.mark.parametrize("form", FORMS[1:], ids=lambda f: f[0])
def test_gptq_with_uncorrelated_inputs_rounds_to_nearest(form):
    w = weight()
    own = np.diag(np.linspace(1, 2, 48).astype(np.float32))
    np.testing.assert_array_equal(by_gptq(w, own, *form).codes, quantize(w, *form).codes)


def test_an_input_that_is_always_zero_changes_nothing_else():
    x, w = inputs(), weight()
    x[:, [3, 17]] = 0
    found = by_gptq(w, x.T @ x, "nf4", 16, False)
    lone = quantize(w, "nf4", 16, False)
    np.testing.assert_array_equal(value(found)[[3, 17]], value(lone)[[3, 17]])
    assert np.isfinite(value(found)).all()
    np.testing.assert_array_equal(
        by_gptq(w, np.zeros((48, 48), np.float32), "nf4", 16, False).codes, lone.codes
    )


def by_solving(w, moment, scale, levels):
    """GPTQ as it is derived: round one input, then move all the later ones to where the outputs' error is
    least.
    """
    w, done = w.astype(np.float64).copy(), []
    own = np.diag(moment).astype(np.float64)
    h = moment.astype(np.float64) + np.diag(np.full(len(w), calibrated_rounding.DAMPING * own.mean()))
    order = list(np.argsort(-np.diag(moment), kind="stable"))
    out = np.zeros_like(w)
    for n, j in enumerate(order):
        nearest = np.abs(w[j][None] - levels[:, None] * scale[j][None]).argmin(0)
        out[j] = levels[nearest] * scale[j]
        error, rest = w[j] - out[j], order[n + 1 :]
        if rest:  # minimise d^T H d with d[j] = -error and d[done] = 0
            w[rest] += np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j][:, None] * error[None])
        done.append(j)
    return out


def test_the_codes_are_those_of_the_least_squares_that_gptq_solves():
    x, w = inputs(), weight()
    moment = x.T @ x
    plain = quantize(w, "nf4", 16, False)
    expected = by_solving(w, moment, np.repeat(plain.scale.astype(np.float64), 16, 0), NF4.astype(np.float64))
    same = np.isclose(value(by_gptq(w, moment, "nf4", 16, False)), expected, atol=1e-5)
    assert same.mean() > 0.99  # float32: a tie that falls the other way moves what follows


# Squared inputs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    write_folder(folder / "base", tiny_torch())
    write_rows(
        folder / "rows.jsonl", [{"text": f"{i} and {i} are {2 * i}, or so they say"} for i in range(60)]
    )
    return folder


def test_squares_are_those_of_the_inputs_that_transformers_layers_get(place):
    ref, tokens = str(place / "base"), some_tokens(rows=3, time=12)
    tokens = tokens.replace(segments=tokens.segments * (np.arange(12) < 11))  # padding is not counted
    model = pretrained.model_for(ref, dtype=jnp.float32)
    base = pretrained.load_frozen(ref, model, one_device())
    paths = list(storage.quantised_paths(model.specs, Quant()))
    found = jax.jit(partial(squared_inputs, model, paths))(base, tokens)
    theirs, seen = tiny_torch(), {}

    def look(name):
        return lambda _, x: seen.update({name: x[0].detach()[:, :-1].numpy()})

    for name, layer in theirs.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(look(name))
    theirs(torch.tensor(np.asarray(tokens.ids), dtype=torch.long))
    assert found.keys() == set(paths) and len(seen) == 7 * 3
    for path in paths:
        name = model.weight_names[path][0].removesuffix(".weight")
        expected = np.stack([np.square(seen[name.format(i=i)]).sum((0, 1)) for i in range(3)])
        np.testing.assert_allclose(found[path], expected, rtol=1e-4)


# The command


@pytest.fixture
def quantized(place, monkeypatch, capsys):
    """The exit code and what was printed by scripts/quantize.py in the place."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["quantize.py", *argv])
        monkeypatch.setenv("JAXFT_CACHE", str(place / "cache"))
        monkeypatch.chdir(place)
        return terminal.one_line_errors(
            runpy.run_path(str(ROOT / "scripts" / "quantize.py"))["main"]
        ), capsys.readouterr().err

    return call


@pytest.mark.slow
def test_a_calibrated_base_is_closer_to_the_model_than_an_uncalibrated_one(place, quantized):
    form = ("--model", "base", "--kind", "int4", "--block", "32", "--targets", "layers/attn/.*")
    assert quantized(*form, "--out", "plain")[0] == 0
    (place / "dirty.jsonl").write_text((place / "rows.jsonl").read_text() + '{"text": 7}\n')
    rows = ("--calibrate", "dirty.jsonl", "--tokens", "512", "--max-length", "64")
    code, reported = quantized(*form, "--out", "looked", *rows)
    assert code == 1 and "dirty.jsonl:61: column 'text' must be a string, got int" in reported
    code, reported = quantized(*form, "--out", "looked", *rows, "--invalid", "drop")
    assert code == 0 and "calibrated layer 3 of 3" in reported, reported
    assert "1 invalid rows left out" in reported
    text = [json.loads(line)["text"] for line in (place / "rows.jsonl").read_text().splitlines()][-4:]
    ids, logits = (
        np.array([pretrained.load_tokenizer(str(place / "base")).encode(t)[:28] for t in text], np.int32),
        {},
    )
    tokens = some_tokens(rows=4, time=28).replace(ids=ids)
    for name in ("base", "plain", "looked"):
        model = pretrained.model_for(str(place / name), dtype=jnp.float32)
        base = pretrained.load_frozen(
            str(place / name), model, one_device(), None if name == "base" else Quant("checkpoint")
        )
        logits[name] = np.asarray(model.logits(model.head(base), model.hidden(base, tokens)[0]))
    off = {name: np.square(logits[name] - logits["base"]).mean() for name in ("plain", "looked")}
    assert 0 < off["looked"] < 0.8 * off["plain"], off


def test_too_few_tokens_are_refused(quantized):
    code, reported = quantized(
        "--model", "base", "--out", "none", "--calibrate", "rows.jsonl", "--tokens", "100"
    )
    assert code == 1 and "100 calibration tokens (--tokens, quant.calibrate_tokens)" in reported
    assert "fewer than one row of 512 (--max-length, data.max_length)" in reported
