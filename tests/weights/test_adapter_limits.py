"""What other programs do not load of an adapter is named with what works, and nothing else is."""

from pathlib import Path

import pytest

from jaxft.nn.adapters.lora import Adapter
from jaxft.weights.hub import hub
from jaxft.weights.peft.adapter_limits import loading_notes

CASES = [
    ({}, False, None, None),
    (dict(rank=64), False, "--max-lora-rank 64", None),
    (dict(rank_pattern=(("q", 8),)), False, "rank_pattern in its latest versions only", None),
    (dict(dora=True), False, "does not load DoRA", "does not load DoRA"),
    (dict(dora=True, rank=64), False, "does not load DoRA", "does not load DoRA"),
    (dict(modules_to_save=("lm_head",), bias="all"), False, "modules_to_save and biases", "and biases"),
    (dict(trainable_token_indices=(3,)), False, "trainable tokens in its latest", "load trainable tokens"),
    (dict(alpha_pattern=(("q", 3.0),)), False, "alpha_pattern in its latest", "ignores alpha_pattern"),
    (dict(rslora=True), False, None, "ignores rsLoRA's scale"),
    (dict(targets=("q", "lm_head")), True, None, "a pair of a tied head"),
    (dict(targets=("q", "lm_head")), False, None, None),
]


@pytest.mark.parametrize("changes, tied, vllm, llama", CASES, ids=str)
def test_each_limit_has_a_line_with_the_way_that_works(changes, tied, vllm, llama):
    lines = loading_notes(Adapter(**{"rank": 16, **changes}), tied, Path("runs/a b/adapter"), "org/base")
    for program, words in (("vLLM", vllm), ("llama.cpp", llama)):
        (own,) = [line for line in lines if line.startswith(program)] or [None]
        assert (own is None) == (words is None) and (words is None or words in own), (own, words)
    for line in lines:
        assert "\n" not in line and ("'runs/a b/adapter'" in line or "--max-lora-rank" in line)


def test_a_base_that_only_this_machines_cache_has_is_named_with_the_merged_model(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    ref = str(tmp_path / hub.EXTENDED / "SmolLM2-0123456789abcdef")
    (line,) = [x for x in loading_notes(Adapter(16), False, Path("out"), ref) if ref in x]
    assert "only in this machine's cache" in line and "--adapter out --out merged" in line
