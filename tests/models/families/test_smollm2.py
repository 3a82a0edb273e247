"""SmolLM2-135M in float32 against transformers: logits on real text and greedy completions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import engine_of
from smollm2 import REF, reference
from test_llama import tokens_of

from jaxft.data.chat.loss_mask import example_prompt_ids
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.row_files import Row
from jaxft.distributed import sharding
from jaxft.engine.sampling import Sampling
from jaxft.engine.session import Session, generate
from jaxft.models.adapted import adapted
from jaxft.weights import pretrained

torch = pytest.importorskip("torch")

TEXT = """The lighthouse keeper had counted 1,204 ships since March, and only three of them had answered his signal. "It isn't
the lamp," he wrote to his sister in Málaga; "it's that nobody looks up any more."

def moving_average(values, width=3):
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]

Low-rank adaptation freezes the pretrained weights and trains the product of two thin matrices beside each of them. 在东京，
春天的第一天下了雪。 Die Straßenbahn fuhr um 6:45 Uhr; wir kamen zu spät. 🙂 Съешь же ещё этих мягких французских булок.
Q: If 17 apples cost $8.50, what do 40 cost? A: One apple costs $0.50, so 40 of them cost $20.00."""  # noqa: E501

PAD = 0  # <|endoftext|>, which no completion contains
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue, "
    "and then give the formula for the area of a circle of radius r.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List three fruits." + " Think about colour, taste and season before you answer." * 8,
    "Hi",
)


@pytest.fixture(scope="module")
def both():
    """(transformers model, jaxft model, its parameters, tokenizer)."""
    mesh = sharding.make_mesh(sharding.MeshShape(data=1), jax.devices()[:1])
    model = pretrained.model_for(REF, dtype=jnp.float32)
    whole = {"base": pretrained.load_frozen(REF, model, mesh)}
    return reference(), adapted(model, None), whole, pretrained.load_tokenizer(REF)


def test_logits_on_real_text_equal_transformers(both):
    theirs, model, whole, tokenizer = both
    ids = np.array([tokenizer.encode(TEXT)], np.int32)
    assert ids.shape[1] > 200
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits[0].numpy()
    found = np.asarray(
        jax.jit(lambda p, t: model.logits(model.head(p), model.hidden(p, t)[0]))(whole, tokens_of(ids))[0]
    )
    assert np.abs(found - expected).max() <= 2e-3
    best = np.sort(expected, -1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 0.01
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.slow
def test_greedy_completions_of_a_ragged_batch_equal_transformers(both):
    theirs, model, whole, tokenizer = both
    prompts = list(example_prompt_ids([prompt_of(Row("r", {"prompt": text})) for text in PROMPTS], tokenizer))
    sizes = [len(prompt) for prompt in prompts]
    assert len(set(sizes)) == len(sizes) and max(sizes) > 64 > min(sizes)
    engine = engine_of(
        (model, whole), Sampling(max_new=64), (tokenizer.eos_token_id,), len(prompts), max(sizes)
    )
    found = generate(Session(engine, whole, jax.random.key(0)), prompts)

    ids, mask = np.zeros((2, len(prompts), max(sizes)), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matmuls on several threads are slow on a busy machine
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=PAD,
        )
    torch.set_num_threads(threads)
    for answer, row in zip(found, expected[:, ids.shape[1] :].tolist(), strict=True):
        assert answer == [token for token in row if token != PAD]
    lengths = [len(answer) for answer in found]
    assert all(PAD not in answer for answer in found)
    assert (
        min(lengths) < 64 == max(lengths) and found[lengths.index(min(lengths))][-1] == tokenizer.eos_token_id
    )
