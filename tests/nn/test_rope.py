"""Rope of every kind against transformers' functions and modules, alone and in packed rows."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.dense_config import rope_from_hf
from jaxft.nn.rope import (
    Rope,
    attention_scaling,
    example_lengths,
    frequencies,
    needs_lengths,
    rope_angles,
    rotate,
)

HEAD, LONGEST = 16, 64
FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0, 14.0, 20.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **FACTORS}
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    "dynamic, another original length": {  # which transformers ignores
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
    },
    "yarn": YARN,
    "yarn, no original length": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, betas": {**YARN, "beta_fast": 20.0, "beta_slow": 2.5},
    "yarn, narrow": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
    "yarn, one point": {**YARN, "beta_fast": 1.82, "beta_slow": 1.82, "truncate": False},
    "yarn, attention factor": {**YARN, "attention_factor": 0.8},
    "yarn, mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn, one mscale": {**YARN, "mscale": 1.2},
    "yarn, mscale 0": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.0},
    "yarn, factor below 1": {**YARN, "factor": 0.5},
    "longrope": LONG,
    "longrope, factor": {**LONG, "factor": 8.0},
    "longrope, no factor": {**LONG, "original_max_position_embeddings": LONGEST},
    "longrope, attention factor": {**LONG, "attention_factor": 1.3},
    "proportional": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "proportional, divided": {
        "rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.6, "factor": 2.0
    },
}  # fmt: skip
PARTS = {
    f"{name}, half": {**KINDS[name], "partial_rotary_factor": 0.5}
    for name in ("linear", "dynamic", "llama3", "yarn")
} | {
    "longrope, half": {**LONG, "partial_rotary_factor": 0.5} | {k: v[::2] for k, v in FACTORS.items()},
}


def their_config(parameters):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * HEAD, num_attention_heads=4, head_dim=HEAD, max_position_embeddings=LONGEST,
        rope_parameters=copy.deepcopy(parameters),
    )  # fmt: skip


def our_rope(parameters):
    return rope_from_hf({"rope_parameters": parameters}, LONGEST)


def angles(rope, positions, lengths=None):
    positions = jnp.asarray(positions, jnp.int32)
    lengths = None if lengths is None else jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), positions.shape)
    return compiled(rope, HEAD, positions, lengths, jnp.float32)


compiled = jax.jit(rope_angles, static_argnums=(0, 1, 4))
QUICK = (
    "default", "linear", "dynamic", "llama3", "yarn", "yarn, mscale", "longrope", "longrope, half",
    "proportional",
)  # fmt: skip
quick_ropes = pytest.mark.quick_cases(*QUICK)


@partial(jax.jit, static_argnames="quick")
def of_ropes(quick, positions, lengths):
    """{name: angles} of the ropes that are tested by default, or of the others, in one program."""
    return {
        name: rope_angles(our_rope(parameters), HEAD, positions, lengths, jnp.float32)
        for name, parameters in {**KINDS, **PARTS}.items()
        if (name in QUICK) is quick
    }


def angles_of(name, positions, lengths):
    positions = jnp.asarray(positions, jnp.int32)
    lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), positions.shape)
    return of_ropes(name in QUICK, positions, lengths)[name]


@pytest.mark.parametrize("name", {**KINDS, **PARTS})
def test_frequencies_and_attention_factor_equal_transformers(name):
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    parameters = {**KINDS, **PARTS}[name]
    functions = {**ROPE_INIT_FUNCTIONS, "default": Phi3RotaryEmbedding.compute_default_rope_parameters}
    theirs, scaling = functions[parameters["rope_type"]](their_config(parameters), "cpu")
    rope = our_rope(parameters)
    np.testing.assert_allclose(frequencies(rope, HEAD), theirs.numpy(), rtol=2e-6)
    np.testing.assert_allclose(attention_scaling(rope), scaling, rtol=1e-12)


@quick_ropes
@pytest.mark.parametrize("name", {**KINDS, **PARTS})
def test_cos_and_sin_equal_those_of_transformers_at_every_length(name):
    torch = pytest.importorskip("torch")
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    parameters = {**KINDS, **PARTS}[name]
    config = their_config(parameters)
    for length in (20, 32, 33, 64, 65, 200):
        theirs = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
        for ours, halves in zip(angles_of(name, [range(200)], length), theirs, strict=True):
            half = halves.shape[-1] // 2
            np.testing.assert_allclose(ours[:, :length], halves[..., :half].numpy(), atol=5e-5)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_the_length_matters_beyond_the_original_length_only(name):
    rope = our_rope(KINDS[name])
    assert needs_lengths(rope) and not needs_lengths(Rope())
    original = rope.original_max_positions
    same, less, beyond = (angles(rope, [range(9)], n) for n in (original, 9, original + 1))
    np.testing.assert_array_equal(same, less)
    assert np.abs(np.asarray(beyond) - np.asarray(same)).max() > 1e-3
    with pytest.raises(ValueError, match="needs the lengths"):
        angles(rope, [range(9)])


def packed(lengths, total):
    """Positions and segments [total] of examples one after the other, then padding."""
    padding = np.zeros(total - sum(lengths), int)
    positions = np.concatenate([*map(np.arange, lengths), padding])
    return positions, np.concatenate([np.repeat(np.arange(len(lengths)) + 1, lengths), padding])


@pytest.mark.quick_cases(*(name for name in QUICK if name in KINDS))
@pytest.mark.parametrize("name", KINDS)
def test_a_packed_row_has_the_angles_of_each_example_alone(name):
    rows = [(20, 70, 33, 5), (64, 65), (130,)]
    positions, segments = (
        jnp.asarray(x, jnp.int32) for x in zip(*[packed(row, 140) for row in rows], strict=True)
    )
    lengths = jax.jit(example_lengths)(positions, segments)
    found = angles_of(name, positions, lengths)
    for r, row in enumerate(rows):
        for i, length in enumerate(row):
            start = sum(row[:i])
            for ours, alone in zip(found, angles_of(name, [range(140)], length), strict=True):
                np.testing.assert_array_equal(ours[r, start : start + length], alone[0, :length])


def test_responses_to_a_shared_prompt_are_one_example_as_long_as_the_longest():
    # a prompt of 4, responses of 3 and 7; then another example, then padding
    positions = np.r_[0:4, 4:7, 4:11, 0:5, [0, 0]][None]
    segments = np.r_[np.full(14, 1), np.full(5, 2), [0, 0]][None]
    lengths = example_lengths(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))
    np.testing.assert_array_equal(lengths[0, :19], np.r_[np.full(14, 11), np.full(5, 5)])


def random(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


@pytest.mark.parametrize("rotated", [1.0, 0.75, 0.5])
def test_rotation_equals_transformers(rotated):
    torch = pytest.importorskip("torch")
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

    parameters = {**KINDS["default"], "partial_rotary_factor": rotated}
    q, k = random(2, 9, 4, HEAD), random(2, 9, 2, HEAD)
    positions = np.array([np.arange(9), np.r_[0:4, 500:505]])

    def heads_first(x):
        return torch.tensor(np.asarray(x)).transpose(1, 2)

    cos, sin = Phi3RotaryEmbedding(their_config(parameters))(heads_first(q), torch.tensor(positions))
    target = apply_rotary_pos_emb(heads_first(q), heads_first(k), cos, sin)
    ours = angles(our_rope(parameters), positions)
    assert ours[0].shape == (2, 9, int(rotated * HEAD / 2))
    for x, theirs in zip((q, k), target, strict=True):
        np.testing.assert_allclose(rotate(x, *ours), theirs.transpose(1, 2).numpy(), atol=1e-4)
        np.testing.assert_allclose(rotate(x, *ours, 0.3), 0.3 * theirs.transpose(1, 2).numpy(), atol=1e-4)


def test_rope_preserves_norms_and_depends_on_distance_only():
    q, k = random(1, 1, 1, HEAD), random(1, 1, 2, HEAD)[:, :, 1:]

    turned = jax.jit(rotate)

    def turn(x, at):
        return turned(x, *angles(Rope(), [[at]]))

    np.testing.assert_allclose(jnp.linalg.norm(turn(q, 77)), jnp.linalg.norm(q), rtol=1e-6)
    near, far = jnp.vdot(turn(q, 7), turn(k, 4)), jnp.vdot(turn(q, 53), turn(k, 50))
    np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-5)
    assert abs(near - jnp.vdot(turn(q, 8), turn(k, 4))) > 1e-3


def test_layers_without_rope_are_not_rotated_and_bfloat16_is_rounded_once():
    x, at = random(1, 5, 2, HEAD, dtype=jnp.bfloat16), np.arange(1000, 1005)[None]
    np.testing.assert_array_equal(rotate(x, *angles(Rope(kind="none"), at)), x)
    for rope in (Rope(), Rope(rotated=0.5)):
        found = rotate(x, *angles(rope, at), 1 / 3)
        wide = rotate(x.astype(jnp.float32), *angles(rope, at)) * jnp.float32(1 / 3)
        np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(kind="ntk"), "rope_type='ntk'; use one of default, linear"),
        (dict(factor=2.0), "rope type 'default' does not use factor=2.0"),
        (dict(kind="linear", factor=2.0, beta_fast=9.0), "'linear' does not use beta_fast=9.0"),
        (dict(kind="linear", factor=0.0), "rope: factor=0.0; expected above 0"),
        (dict(kind="yarn", factor=2.0), "'yarn' needs original_max_position_embeddings above 0, got None"),
        (dict(kind="dynamic", factor=2.0, original_max_positions=0), "above 0, got 0"),
        (dict(theta=float("nan")), "rope_theta=nan; expected a finite number at least 1"),
        (dict(rotated=1.5), "partial_rotary_factor=1.5; expected above 0 and at most 1"),
        (
            dict(kind="llama3", original_max_positions=8, low_freq_factor=4.0),
            "below high_freq_factor, which must be finite, got low_freq_factor=4.0, high_freq_factor=4.0",
        ),
        (dict(kind="yarn", original_max_positions=8, beta_slow=64.0), "beta_slow=64.0, beta_fast=32.0"),
        (dict(kind="yarn", original_max_positions=8, beta_fast=np.inf), "beta_fast, which must be finite"),
        (dict(kind="yarn", original_max_positions=8, theta=1.0), "rope_theta must be above 1 for"),
        (dict(kind="yarn", original_max_positions=8, mscale=-1.0), "rope: mscale=-1.0; expected at least 0"),
        (dict(kind="longrope", original_max_positions=8, short_factor=(0.0,)), "short_factor=0.0; expected"),
        (dict(kind="longrope", original_max_positions=1), "max_position_embeddings must be above 1"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_one_line(settings, words):
    with pytest.raises(ValueError) as caught:
        Rope(**settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)
