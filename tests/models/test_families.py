"""Every family against transformers: logits, hidden states, gradients, folders, decoding, greedy text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import FAMILIES, both, logits_of, params_of, random_ids, rows

from jaxft.inference.generate import Sampling, make_generate
from jaxft.models.families import config_to_hf, family_of
from jaxft.tree import paths
from jaxft.weights import hf, hf_write, param_reader, pretrained

torch = pytest.importorskip("torch")
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_logits_and_hidden_states_equal_transformers(name):
    theirs, ours, params = both(name)
    ids = random_ids(2, 70)
    with torch.no_grad():
        out = theirs(torch.tensor(ids).long(), output_hidden_states=True)
    h = ours.hidden(params, rows(ids))
    np.testing.assert_allclose(np.asarray(h), out.hidden_states[-1].numpy(), atol=1e-4, rtol=1e-4)
    logits = np.asarray(ours.logits(ours.head(params), h))
    assert np.abs(logits).max() > 0.5
    np.testing.assert_allclose(logits, out.logits.numpy(), atol=1e-4)


@every_family
def test_gradients_equal_transformers(name):
    theirs, ours, params = both(name)
    ids, targets = random_ids(1, 24), random_ids(1, 24, seed=1)

    def loss(params):
        logits = ours.logits(ours.head(params), ours.hidden(params, rows(ids)))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), jnp.asarray(targets)[..., None], 2)
        return -chosen.mean()

    theirs.zero_grad()
    logits = theirs(torch.tensor(ids).long()).logits
    expected = torch.nn.functional.cross_entropy(logits[0].float(), torch.tensor(targets[0]).long())
    expected.backward()
    ours_loss, grads = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(float(ours_loss), expected.item(), rtol=1e-5)
    named = {name: p.grad for name, p in theirs.named_parameters()}
    for path, grad in paths(params_of(named, ours)).items():
        found, size = np.asarray(paths(grads)[path]), np.abs(np.asarray(grad)).max()
        np.testing.assert_allclose(found, np.asarray(grad), atol=2e-4 * size + 1e-7, err_msg=path)


@every_family
def test_a_config_written_is_read_alike_by_transformers_and_by_us(name):
    from transformers import AutoConfig

    theirs, ours, _ = both(name)
    written = config_to_hf(ours.config)
    family = family_of(written)
    assert family.from_hf(written) == ours.config
    kind = written.pop("model_type")
    read = AutoConfig.for_model(kind, **written)
    assert family.from_hf(read.to_dict()) == ours.config


@every_family
def test_an_exported_folder_has_the_same_logits_in_transformers_and_here(name, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs, ours, params = both(name)
    ids = random_ids(2, 40)
    expected = logits_of(ours, params, rows(ids))
    hf_write.save_folder(tmp_path, ours, params, None, None, hf_write.WriteOptions(max_shard=40_000))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = reloaded(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    again = pretrained.model_for(str(tmp_path), dtype=jnp.float32)
    assert again.config == ours.config
    readers = param_reader.param_readers(hf.open_folder(tmp_path), again)
    for path, value in paths(params).items():
        np.testing.assert_array_equal(param_reader.read_whole(readers[path]), np.asarray(value), err_msg=path)


def padded_left(ids, count):
    """The same rows with `count` positions of padding before the second."""
    ids, segments = ids.copy(), np.ones_like(ids)
    ids[1, :count], segments[1, :count] = 0, 0
    return rows(ids, segments, np.maximum(np.cumsum(segments, 1) - 1, 0))


@every_family
def test_prefill_and_decoding_equal_one_forward_pass(name):
    _, ours, params = both(name)
    batch, start = padded_left(random_ids(2, 26), 3), 13
    whole = np.asarray(ours.hidden(params, batch))
    prompt = jax.tree.map(lambda x: x[:, :start] if x.shape[1] == 26 else x, batch)
    h, cache = ours.prefill(params, prompt, 26)
    np.testing.assert_allclose(np.asarray(h)[0], whole[0, :start], atol=2e-5, rtol=1e-4)
    decode = jax.jit(ours.decode)
    for at in range(start, 26):
        h, cache = decode(params, cache, batch.ids[:, at], batch.positions[:, at], jnp.int32(at))
        np.testing.assert_allclose(np.asarray(h), whole[:, at], atol=2e-5, rtol=1e-4)


@every_family
def test_greedy_text_is_that_of_transformers(name):
    theirs, ours, params = both(name)
    ids = random_ids(2, 20, seed=3)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(ids).long(), attention_mask=torch.ones(ids.shape, dtype=torch.long),
            max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0,
        )[:, 20:]  # fmt: skip
    found = make_generate(ours, Sampling(32), ())(params, rows(ids), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(found), expected.numpy())


@every_family
def test_packed_examples_have_the_logits_of_each_alone(name):
    _, ours, params = both(name)
    first, second = random_ids(1, 17), random_ids(1, 12, seed=5)
    alone = [logits_of(ours, params, rows(x))[0] for x in (first, second)]
    ids = np.concatenate([first, second, np.zeros((1, 3), np.int32)], 1)
    segments = np.array([[1] * 17 + [2] * 12 + [0] * 3])
    positions = np.concatenate([np.arange(17), np.arange(12), np.zeros(3)])[None]
    packed = logits_of(ours, params, rows(ids, segments, positions))[0]
    np.testing.assert_allclose(packed[:17], alone[0], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(packed[17:29], alone[1], atol=2e-5, rtol=1e-4)


@every_family
def test_responses_that_share_a_prompt_have_the_logits_of_each_with_it(name):
    _, ours, params = both(name)
    prompt, responses = random_ids(1, 11), [random_ids(1, 9, seed=1), random_ids(1, 6, seed=2)]
    ids = np.concatenate([prompt, *responses], 1)
    positions = np.concatenate([np.arange(11), 11 + np.arange(9), 11 + np.arange(6)])[None]
    branches = np.array([[0] * 11 + [1] * 9 + [2] * 6])
    shared = logits_of(ours, params, rows(ids, None, positions, branches))[0]
    for response, part in zip(responses, (shared[11:20], shared[20:26]), strict=True):
        alone = logits_of(ours, params, rows(np.concatenate([prompt, response], 1)))[0, 11:]
        np.testing.assert_allclose(part, alone, atol=2e-5, rtol=1e-4)
