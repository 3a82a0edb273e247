"""SFT, then DPO, merged and written as GGUF: the files' text and perplexity, here and in llama.cpp."""

import json
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf_text import (
    GAP,
    SMOLLM2,
    Prompts,
    assert_greedy,
    assert_q8_0_is_bf16,
    completion_logits,
    completions_of_runtime,
    logits_of_files,
    perplexity,
)

from jaxft.weights import pretrained
from jaxft.weights.gguf.gguf_file import read_gguf_header

ROOT = Path(__file__).resolve().parents[3]
ROWS = [
    json.loads(line) for line in (ROOT / "configs/data/extraction_held_out.jsonl").read_text().splitlines()
]
LENGTH = 110  # tokens of a row
KINDS = ("F32", "BF16", "Q8_0", "Q4_K_M")


def run_script(folder, name, *args):
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # the tests' are slow
    command = list(map(str, (sys.executable, ROOT / "scripts" / f"{name}.py", *args)))
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """GGUF files of a model after 60 steps of SFT and 10 of DPO-Positive, by type."""
    folder = tmp_path_factory.mktemp("chain")
    quick = ("dtype=float32", "held_out=none", "samples=0", "general=none")
    sft = ("--config", ROOT / "configs/sft.py", "name=sft", "loop.steps=60", *quick)
    loss = ("lr=2e-4", "loss=jaxft.objectives.losses.preference_losses:dpop")
    dpo = ("--config", ROOT / "configs/dpo.py", "name=dpo", "start=runs/sft", "loop.steps=10", *loss, *quick)
    for args in (sft, dpo):
        run_script(folder, "train", *args)
    for kind in KINDS:
        run_script(folder, "export", "--run", "runs/dpo", "--out", f"{kind}.gguf", "--gguf", kind)
    return {kind: folder / f"{kind}.gguf" for kind in KINDS}


@pytest.fixture(scope="module")
def logits():
    return logits_of_files()


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.load_tokenizer(SMOLLM2)


def chat(row):
    return [{"role": "user", "content": row["instruction"]}]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Ten held-out messages, none of whose values is in a training row."""
    texts = [
        tokenizer.apply_chat_template(chat(row), add_generation_prompt=True, tokenize=False)
        for row in ROWS[:10]
    ]
    return Prompts([tokenizer(text).input_ids for text in texts], LENGTH, tokenizer.eos_token_id)


@pytest.mark.slow
def test_q8_0_has_the_greedy_text_of_bfloat16_here_and_in_llama_cpp(files, logits, tokenizer, prompts):
    path = files["Q8_0"]
    assert read_gguf_header(path).metadata["tokenizer.chat_template"] == tokenizer.chat_template
    runtime = llama_cpp.Runtime(path)
    assert [runtime.token_ids(runtime.chat_text(chat(row))) for row in ROWS[:10]] == prompts.ids
    theirs = completions_of_runtime(runtime, prompts)
    assert_greedy(theirs, completion_logits(logits, path, prompts, theirs), GAP)
    texts = assert_q8_0_is_bf16(logits, files["BF16"], path, prompts, theirs)
    decoded = [tokenizer.decode(x, skip_special_tokens=True) for x in texts]
    right = sum(row["response"].startswith(x) for row, x in zip(ROWS, decoded, strict=False))
    print(f"{right} of 10 are right")
    assert right >= 5


@pytest.mark.slow
def test_perplexity_of_q4_k_m_is_within_3_percent_of_llama_quantizes_file(files, logits, tokenizer, tmp_path):
    """On English text, and on held-out conversations."""
    theirs = tmp_path / "theirs.gguf"
    llama_cpp.quantise_file(files["F32"], theirs, "Q4_K_M")
    chats = [
        tokenizer.apply_chat_template(
            [*chat(row), {"role": "assistant", "content": row["response"]}], tokenize=False
        )
        for row in ROWS[10:40]
    ]
    texts = {"English": (ROOT / "LICENSE").read_text(), "conversations": "".join(chats)}
    ids = [
        np.array(tokenizer(text).input_ids[: 20 * LENGTH], np.int32).reshape(20, LENGTH)
        for text in texts.values()
    ]
    paths = (files["BF16"], files["Q4_K_M"], theirs)
    found = [[perplexity(logits, path, x) for x in ids] for path in paths]
    for name, base, ours, other in zip(texts, *found, strict=True):
        print(f"{name}: perplexity {base:.3f} in BF16, {ours:.3f} in Q4_K_M, llama-quantize's {other:.3f}")
        assert ours < 1.03 * other
