"""SmolLM2-135M written as GGUF, against what llama.cpp's own quantiser and runtime make of the same weights:
errors of tensors, perplexity, greedy text.
"""

import shutil
from pathlib import Path

import gguf as gguf_package
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_text import (
    SMOLLM2,
    Prompts,
    assert_greedy,
    assert_q8_0_is_bf16,
    completion_logits,
    completions_of_runtime,
    logits_of_files,
    perplexity,
)

from jaxft.train.export.export import ExportSource, export_gguf
from jaxft.weights import pretrained
from jaxft.weights.gguf.gguf_file import read_gguf_header
from jaxft.weights.gguf.gguf_quantize import MIXTURES, MixtureModel, tensor_bytes, tensor_kind
from jaxft.weights.hf.hub import locate

PROMPTS = (
    "The capital of France is", "Water boils at", "Write a haiku about the sea.", "2 + 2 =",
    "Photosynthesis is", "def fibonacci(n):", "List three primary colours:", "Once upon a time",
    "The largest planet of the solar system", "To make a cup of tea,",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[3]
TEXT = ROOT / "LICENSE"  # English that every clone has
LENGTH = 64  # tokens of a row
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
    return logits_of_files()


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def license_ids(tokenizer):
    """Token ids [20, LENGTH] of English text."""
    return np.array(tokenizer(TEXT.read_text()).input_ids[: 20 * LENGTH], np.int32).reshape(20, LENGTH)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return Prompts([tokenizer(prompt).input_ids for prompt in PROMPTS], LENGTH, tokenizer.eos_token_id)


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
def test_llama_quantizes_files_have_the_same_types_and_are_no_better(exported, logits, license_ids, tmp_path):
    """llama-quantize reads jaxft's F32 file and writes each mixture: tensors of the same types, with the same
    bytes for simple ones and no smaller errors for the others; jaxft's perplexity is within 1 %.
    """
    exact = {t.name: t.data for t in gguf_package.GGUFReader(exported("F32")).tensors}
    base = perplexity(logits, exported("F32"), license_ids)
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
        ours = perplexity(logits, exported(mixture), license_ids)
        other = perplexity(logits, theirs, license_ids) if ratios else ours
        print(
            f"{mixture}: perplexity {ours:.3f}, llama-quantize {other:.3f} (F32 {base:.3f}); "
            f"errors of {len(ratios)} matrices {np.round([np.min(ratios or 1), np.max(ratios or 1)], 4)}"
        )
        assert ours < 1.01 * other


def importances(exact):
    """Random ones of the layers' matrices, by their Hugging Face and by their GGUF names."""
    model, rng = pretrained.model_for(SMOLLM2), np.random.default_rng(0)
    names = gguf_package.get_tensor_name_map(gguf_package.MODEL_ARCH.LLAMA, 30)
    of_hf, of_gguf = {}, {}
    for path, (pattern, *_) in model.weight_names.items():
        for hf in (pattern.format(i=i) for i in range(30 if path.startswith("layers/") else 0)):
            name = names.get_name(hf, try_suffixes=(".weight",))
            if exact[name].ndim == 2:
                of_hf[hf] = of_gguf[name] = rng.gamma(1, 1, exact[name].shape[-1]).astype(np.float32)
    return of_hf, of_gguf


@pytest.mark.slow
def test_ggml_is_no_better_with_importances(exported, logits, tokenizer, license_ids, tmp_path):
    """Errors weighted by importances are no larger in any tensor of Q4_K_M; perplexity is within 1 %."""
    exact = {t.name: t.data for t in gguf_package.GGUFReader(exported("F32")).tensors}
    of_hf, of_gguf = importances(exact)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    export_gguf(ours, ExportSource(SMOLLM2, pretrained.model_for(SMOLLM2), tokenizer), "Q4_K_M", of_hf)
    shutil.copyfile(ours, theirs)
    left, ratios = gguf_package.GGUFReader(ours).tensors, []
    for tensor, right in zip(left, gguf_package.GGUFReader(theirs, "r+").tensors, strict=True):
        kind, values, weights = tensor.tensor_type, exact[tensor.name], of_gguf.get(tensor.name)
        if kind.name == "F32":
            continue
        right.data[:] = llama_cpp.quantised(kind, values, weights).reshape(right.data.shape)
        if kind.name == "Q8_0":  # which importances do not change
            assert (tensor.data == right.data).all(), tensor.name
            continue
        found = [error(kind, x.data, values, 1 if weights is None else weights) for x in (tensor, right)]
        ratios.append(found[0] / found[1])
        assert found[0] < 1.001 * found[1], (tensor.name, kind.name, found)
    found = [perplexity(logits, path, license_ids) for path in (ours, theirs)]
    print(
        f"Q4_K_M with importances: perplexity {found[0]:.3f}, ggml's {found[1]:.3f}; errors of {len(ratios)} "
        f"matrices {np.round([min(ratios), max(ratios)], 4)}"
    )
    assert found[0] < 1.01 * found[1]


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    reason="a limit of Q8_0, whose bytes are llama.cpp's: before training, one of the ten prompts has two "
    "tokens 0.22 apart that it swaps; test_gguf_chain.py has the law after training",
)
def test_greedy_text_of_q8_0_is_that_of_bf16(exported, logits, prompts):
    drafts = completions_of_runtime(llama_cpp.Runtime(exported("Q8_0")), prompts)
    assert_q8_0_is_bf16(logits, exported("BF16"), exported("Q8_0"), prompts, drafts)


@pytest.mark.slow
def test_llama_cpps_runtime_generates_the_same_greedy_text(exported, logits, prompts):
    """In float32: its matmuls with quantised weights round activations to 8 bits."""
    runtime = llama_cpp.Runtime(exported("F32"))
    assert [runtime.token_ids(prompt) for prompt in PROMPTS] == prompts.ids
    theirs = completions_of_runtime(runtime, prompts)
    assert_greedy(theirs, completion_logits(logits, exported("F32"), prompts, theirs), 0.02)


def test_types_of_smollm2s_file_are_those_of_its_mixture():
    """The package's file was written by llama-quantize as Q4_1."""
    header, model = read_gguf_header(locate(SMOLLM2).path), MixtureModel("llama", 30, 9, 3, tied=True)
    assert header.metadata["general.file_type"] == 3
    for name, tensor in header.tensors.items():
        assert tensor_kind(name, tensor.shape, "Q4_1", model) == tensor.kind, name
