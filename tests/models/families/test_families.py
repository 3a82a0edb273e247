"""Every family against transformers: logits, hidden states, gradients, exported folders, generated text."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import decoded, engine_of, prefilled
from tiny_families import FAMILIES, QUICK, both, our_model, params_of, random_ids, rows, torch_model

from jaxft.engine.sampling import Sampling
from jaxft.engine.session import Session, complete
from jaxft.models.model_types import config_to_hf, family_of
from jaxft.nn.tree import paths
from jaxft.weights import param_loading, pretrained
from jaxft.weights.hf import hf_read, hf_write

torch = pytest.importorskip("torch")
every_family = pytest.mark.parametrize("name", FAMILIES)
quick_families = pytest.mark.quick_cases(*QUICK)
LENGTH = 70  # longer than the windows, and than the original length of rope
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}


def jit(fn):
    """Compile without optimisation, which would take longer than these tiny programs run."""
    return jax.jit(fn, compiler_options=QUICK_TO_COMPILE)


@functools.cache
def forward_and_backward(name):
    """(hidden states, logits, loss, gradients) of our model, and the ids and targets of the loss."""
    _, ours, params = both(name)
    ids, targets = random_ids(2, LENGTH), random_ids(2, LENGTH, seed=1)

    def loss(params):
        h = ours.hidden(params, rows(ids))[0]
        logits = ours.logits(ours.head(params), h)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), jnp.asarray(targets)[..., None], 2)
        return -chosen.mean(), (h, logits)

    (value, (h, logits)), grads = jit(jax.value_and_grad(loss, has_aux=True))(params)
    return (np.asarray(h), np.asarray(logits), float(value), grads), ids, targets


# Soft caps, multipliers, and layers without rope are in the last three.
@pytest.mark.quick_cases(*QUICK, "gemma2", "granite", "smollm3")
@every_family
def test_logits_and_hidden_states_equal_transformers(name):
    (h, logits, _, _), ids, _ = forward_and_backward(name)
    with torch.no_grad():
        out = torch_model(name)(torch.tensor(ids).long(), output_hidden_states=True)
    np.testing.assert_allclose(h, out.hidden_states[-1].numpy(), atol=1e-4, rtol=1e-4)
    assert np.abs(logits).max() > 0.5
    np.testing.assert_allclose(logits, out.logits.numpy(), atol=1e-4)


@quick_families
@every_family
def test_gradients_equal_transformers(name):
    (_, _, loss, grads), ids, targets = forward_and_backward(name)
    theirs, ours, _ = both(name)
    theirs.zero_grad()
    logits = theirs(torch.tensor(ids).long()).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).long().flatten())
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    named = {name: p.grad for name, p in theirs.named_parameters()}
    for path, grad in paths(params_of(named, ours)).items():
        found, size = np.asarray(paths(grads)[path]), np.abs(np.asarray(grad)).max()
        np.testing.assert_allclose(found, np.asarray(grad), atol=2e-4 * size + 1e-7, err_msg=path)


@every_family
def test_a_written_config_json_is_read_with_the_same_settings_by_transformers_and_by_us(name):
    from transformers import AutoConfig

    ours = our_model(name)
    written = config_to_hf(ours.config)
    family = family_of(written)
    assert family.from_hf(written) == ours.config
    kind = written.pop("model_type")
    read = AutoConfig.for_model(kind, **written)
    assert family.from_hf(read.to_dict()) == ours.config


@quick_families
@every_family
def test_an_exported_folder_has_the_same_logits_in_transformers_and_loads_with_the_same_parameters(
    name, tmp_path
):
    from transformers import AutoModelForCausalLM

    _, ours, params = both(name)
    (_, logits, _, _), ids, _ = forward_and_backward(name)
    hf_write.save_folder(tmp_path, ours, params, None, None, hf_write.WriteOptions(max_shard=40_000))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = reloaded(torch.tensor(ids).long()).logits.numpy()
        np.testing.assert_allclose(
            found, torch_model(name)(torch.tensor(ids).long()).logits.numpy(), atol=1e-5
        )
    np.testing.assert_allclose(found, logits, atol=1e-4)
    again = pretrained.model_for(str(tmp_path), dtype=jnp.float32)
    assert again.config == ours.config
    readers = param_loading.param_readers(hf_read.open_folder(tmp_path), again)
    for path, value in paths(params).items():
        np.testing.assert_array_equal(
            param_loading.read_whole(readers[path]), np.asarray(value), err_msg=path
        )


def padded_left(ids, count):
    """Two rows, of which the second begins with `count` padding tokens."""
    ids, segments = ids.copy(), np.ones_like(ids)
    ids[1, :count], segments[1, :count] = 0, 0
    return rows(ids, segments, np.maximum(np.cumsum(segments, 1) - 1, 0))


@quick_families
@every_family
def test_prefill_and_decoding_equal_one_forward_pass(name):
    _, ours, params = both(name)
    batch, start = padded_left(random_ids(2, 26), 3), 13
    whole = np.asarray(jit(ours.hidden)(params, batch)[0])
    prompt = jax.tree.map(lambda x: x[:, :start] if x.shape[1] == 26 else x, batch)
    h, cache = jit(lambda params, prompt: prefilled(ours, params, prompt, 26 - start))(params, prompt)
    np.testing.assert_allclose(np.asarray(h)[0], whole[0, :start], atol=2e-5, rtol=1e-4)
    decode = jit(partial(decoded, ours))
    for at in range(start, 26):
        token = batch.ids[:, at], batch.positions[:, at]
        h, cache = decode(params, cache, token, at - start)
        np.testing.assert_allclose(np.asarray(h), whole[:, at], atol=2e-5, rtol=1e-4)


@pytest.mark.quick_cases("gemma3")
@every_family
def test_greedy_generation_equals_transformers(name):
    theirs, ours, params = both(name)
    ids = random_ids(2, 20, seed=3)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(ids).long(), attention_mask=torch.ones(ids.shape, dtype=torch.long),
            max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0,
        )[:, 20:]  # fmt: skip
    engine = engine_of((ours, params), Sampling(32), (), 2)
    found = complete(Session(engine, params, jax.random.key(0)), ids.tolist()).tokens[:, 0]
    np.testing.assert_array_equal(found, expected.numpy())


def row(*examples, length=40):
    """(ids, segments, positions, branches) of a row. An example is a prompt and the responses to it."""
    parts = [np.zeros((0, 4), np.int32)]
    for segment, (prompt, *responses) in enumerate(examples, 1):
        for branch, tokens in enumerate((prompt, *responses)):
            first = len(prompt) if branch else 0
            shared = branch if len(responses) > 1 else 0
            parts.append(
                np.array([[token, segment, first + i, shared] for i, token in enumerate(tokens)], np.int32)
            )
    whole = np.concatenate(parts)
    return np.pad(whole, ((0, length - len(whole)), (0, 0)))


@quick_families
@every_family
def test_packing_and_shared_prompts_change_no_logits(name):
    _, ours, params = both(name)
    prompt, first, second, other = (random_ids(1, n, seed=n)[0] for n in (11, 9, 6, 12))
    laid = [
        row((prompt, first)),
        row((prompt, second)),
        row((other,)),
        row((prompt, first), (other,)),  # packed
        row((prompt, first, second), (other,)),  # and with a shared prompt
    ]
    batch = rows(*np.moveaxis(np.stack(laid), 2, 0))
    logits = jit(lambda params, batch: ours.logits(ours.head(params), ours.hidden(params, batch)[0]))
    with_first, with_second, alone, packed, shared = np.asarray(logits(params, batch))
    for found, expected in (
        (packed[:20], with_first[:20]),
        (packed[20:32], alone[:12]),
        (shared[:20], with_first[:20]),
        (shared[20:26], with_second[11:17]),
        (shared[26:38], alone[:12]),
    ):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
