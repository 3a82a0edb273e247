"""Rope settings of config.json, wherever files have them, against transformers' own frequencies."""

import copy
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from engines import decoded, prefilled
from host_weights import load_on_host
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.batch import Tokens
from jaxft.distributed.sharding import MeshShape, make_mesh, shard_batch
from jaxft.models.dense_config import (
    ConfigFormat,
    fields_from_hf,
    fields_to_hf,
    for_transformers_4,
    rope_to_hf,
    ropes_from_hf,
)
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.models.model_types import FAMILIES
from jaxft.nn import param_spec
from jaxft.nn import rope as our_rope
from jaxft.nn.rope import Rope
from jaxft.weights import pretrained

pytest.importorskip("torch")
SIZES = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 16384,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"type": "linear", "factor": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {
    "type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 4096,
}  # fmt: skip


def frequencies(**rope):
    config = FAMILIES["llama"].from_hf({**SIZES, **rope})
    return our_rope.frequencies(config.rope, config.head_dim)


def transformers_frequencies(**rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_dict(copy.deepcopy({**SIZES, **rope}))  # which edits the groups
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


SAME = {
    "transformers 4": dict(rope_theta=5e5, rope_scaling=LLAMA3),
    "transformers 5": dict(rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "both": dict(rope_parameters={**LLAMA3, "rope_theta": 5e5}, rope_scaling={**LLAMA3, "rope_theta": 5e5}),
    "both, theta beside them": dict(rope_theta=5e5, rope_parameters=LLAMA3, rope_scaling=LLAMA3),
    "theta in three places": dict(
        rope_theta=500000, rope_parameters={"rope_theta": 5e5}, rope_scaling=LINEAR
    ),
    "scaling empty": dict(rope_scaling={}, rope_parameters={"rope_type": "linear", "factor": 2.0}),
    "scaling null": dict(rope_scaling=None, rope_theta=300.0),
    "two names of the type": dict(rope_scaling={**LINEAR, "rope_type": "linear"}),
    "original length beside it": dict(
        rope_scaling={k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
        original_max_position_embeddings=8192,
    ),
    "yarn": dict(rope_theta=5e5, rope_scaling=YARN),
    "yarn without an original length": dict(rope_scaling={"type": "yarn", "factor": 2.0}),
    "dynamic": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "longrope as of Phi-3's first files": dict(
        rope_scaling={**LONG, "type": "longrope"}, original_max_position_embeddings=4096
    ),
    "a setting that the type does not use": dict(rope_parameters={"rope_theta": 3e4, "beta_fast": 32}),
    "nothing rotated less": dict(rope_parameters={"rope_theta": 3e4, "partial_rotary_factor": 1.0}),
}


@pytest.mark.parametrize("name", SAME)
def test_rope_settings_are_read_as_transformers_reads_them(name):
    np.testing.assert_allclose(frequencies(**SAME[name]), transformers_frequencies(**SAME[name]), rtol=1e-6)


REFUSED = {
    "another type": (
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling=LINEAR),
        "rope_parameters has rope_type='default', but rope_scaling takes precedence and results in "
        "rope_type='linear'",
    ),
    "another factor": (
        dict(rope_parameters={**LINEAR, "factor": 2.0}, rope_scaling=LINEAR),
        "rope_parameters has factor=2.0, but rope_scaling",
    ),
    "theta that is not used": (  # transformers 5 takes 10000 here
        dict(rope_parameters={**LINEAR, "rope_theta": 5e5}, rope_scaling=LINEAR),
        "rope_parameters has rope_theta=500000.0, but rope_scaling takes precedence and results in "
        "rope_theta=10000.0",
    ),
    "theta beside another": (
        dict(rope_parameters={"rope_theta": 5e5}, rope_theta=1e4),
        "config.json has rope_theta=10000.0, but rope_parameters",
    ),
    "two types": (
        dict(rope_scaling={**LINEAR, "rope_type": "llama3"}),
        "rope_type='llama3' and type='linear'",
    ),
    "no object": (dict(rope_scaling="linear"), "rope_scaling must be an object"),
    "a number as text": (
        dict(rope_scaling={**LINEAR, "factor": "4"}),
        "factor of rope_scaling must be a finite number, got '4'",
    ),
    "theta not finite": (dict(rope_theta=float("nan")), "rope_theta of config.json must be a finite number"),
    "a part missing": (
        dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope type 'llama3' needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "part of a head": (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
    "unknown": (
        dict(rope_parameters={"base_scale": 2}),
        "rope setting 'base_scale' in rope_parameters is not supported; remove it, or use ",
    ),
    "unknown type": (
        dict(rope_scaling={"type": "mrope"}),
        "rope type 'mrope' is not supported; jaxft has",
    ),
    "factors that are no list": (
        dict(rope_scaling={**LONG, "long_factor": 2.0}),
        "long_factor of rope_scaling must be a list of finite numbers, got 2.0",
    ),
    "too few factors": (
        dict(rope_scaling={**LONG, "short_factor": [1.0]}),
        "short_factor must have 8 numbers, one per pair of the 16 rotated dimensions, got 1",
    ),
    "a switch as text": (
        dict(rope_scaling={**YARN, "truncate": "no"}),
        "truncate of rope_scaling must be true or false, got 'no'",
    ),
    "no original length": (
        dict(rope_scaling={k: v for k, v in LONG.items() if k != "original_max_position_embeddings"}),
        "rope type 'longrope' needs original_max_position_embeddings",
    ),
    "one rope per layer type": (
        dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
        "rope_parameters has one object per layer type, which this model_type does not support",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictory_or_invalid_rope_settings_are_one_line(name):
    rope, words = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        frequencies(**rope)
    assert words in str(caught.value) and "\n" not in str(caught.value)


THETAS = st.sampled_from([{}, {"rope_theta": 10000}, {"rope_theta": 5e5}])
TYPES = st.sampled_from(
    [
        *({}, LLAMA3, LINEAR, {**LINEAR, "rope_type": "linear"}, {"type": "default"}, YARN, LONG),
        {**LLAMA3, "factor": 32},
    ]
)
GROUPS = st.builds(lambda kind, theta: {**kind, **theta}, TYPES, THETAS)


@given(st.none() | GROUPS, st.none() | GROUPS, THETAS)
@settings(max_examples=80, deadline=None)
def test_any_accepted_rope_setting_gives_transformers_frequencies(scaling, parameters, theta):
    rope = {"rope_scaling": scaling, "rope_parameters": parameters, **theta}
    try:
        ours = frequencies(**rope)
    except ValueError as e:
        assert "takes precedence" in str(e)
        return
    np.testing.assert_allclose(ours, transformers_frequencies(**rope), rtol=1e-6)


def read_by(config_class, config):
    """What transformers' own class makes of a config.json."""
    import transformers

    return getattr(transformers, config_class).from_dict(copy.deepcopy(config)).to_dict()


PLAIN = Rope(theta=3e5)
ROPES = {
    "default": PLAIN,
    "linear": Rope(kind="linear", factor=4.0),
    "dynamic": Rope(kind="dynamic", factor=2.0, original_max_positions=512),
    "llama3": Rope(5e5, "llama3", 8.0, 512, low_freq_factor=1.0, high_freq_factor=2.0),
    "yarn": Rope(kind="yarn", factor=2.0, original_max_positions=512),
    "yarn with all": Rope(
        kind="yarn", factor=2.0, original_max_positions=512, attention_factor=0.9, mscale=1.0,
        mscale_all_dim=0.5, beta_fast=20.0, beta_slow=2.0, truncate=False,
    ),
    "longrope": Rope(
        kind="longrope", factor=2.0, original_max_positions=512,
        short_factor=tuple(LONG["short_factor"]), long_factor=tuple(LONG["long_factor"]),
    ),
    "longrope with all": Rope(
        kind="longrope", factor=3.0, original_max_positions=512, attention_factor=1.2,
        short_factor=tuple(LONG["short_factor"]), long_factor=tuple(LONG["long_factor"]),
    ),
    "proportional": Rope(kind="proportional", rotated=0.5),
}  # fmt: skip
FORMS = {
    "LlamaConfig": ConfigFormat("llama", "LlamaForCausalLM"),
    "Phi3Config": ConfigFormat("phi3", "Phi3ForCausalLM", partial_rope=True),
    "Qwen3Config": ConfigFormat("qwen3", "Qwen3ForCausalLM", {"attention_bias": False}),
    "SmolLM3Config": ConfigFormat("smollm3", "SmolLM3ForCausalLM", defaults={"rope_theta": 2e6}),
}
LAYERED = {
    "Gemma3TextConfig": ConfigFormat(
        "gemma3_text", "Gemma3ForCausalLM",
        defaults={"rope_theta": {"full_attention": 1e6, "sliding_attention": 1e4}},
        activation="hidden_activation", local_theta="rope_local_base_freq",
    ),
    "Olmo3Config": ConfigFormat(
        "olmo3", "Olmo3ForCausalLM", defaults={"rope_theta": 5e5}, local_theta="rope_theta"
    ),
}  # fmt: skip


def some_config(rope, **changes):
    sizes = dict(vocab=64, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96)
    return LlamaConfig(**{**sizes, "rope": rope, "max_positions": 1024, "eos": (2, 3), **changes})


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in FORMS
        for name, rope in ROPES.items()
        if family != "Phi3Config" or rope.kind in ("default", "longrope")  # Phi-3 has no other kind
    ],
)
def test_what_is_written_is_read_again_by_us_and_through_transformers(family, name):
    form = FORMS[family]
    part = 0.5 if form.partial_rope and ROPES[name].kind == "default" else ROPES[name].rotated
    config = some_config(replace(ROPES[name], rotated=part))
    form = replace(form, partial_rope=part != 1)
    written = fields_to_hf(config, form)
    assert LlamaConfig(**fields_from_hf(written, form)) == config
    assert LlamaConfig(**fields_from_hf(read_by(family, written), form)) == config


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "longrope"])
@pytest.mark.parametrize("family", LAYERED)
def test_ropes_of_layer_types_are_written_for_us_and_for_transformers(family, name):
    form, rope = LAYERED[family], replace(ROPES[name], theta=5e5)
    local = Rope(theta=1e4 if family == "Gemma3TextConfig" else 5e5)
    config = some_config(rope, activation="gelu_tanh")
    written = fields_to_hf(config, form, local)
    assert written[form.activation] == "gelu_pytorch_tanh"
    new_style = {k: v for k, v in written.items() if k not in OLD_STYLE}
    old_style = {k: v for k, v in written.items() if k != "rope_parameters"}
    for file in (written, new_style, old_style, read_by(family, written), read_by(family, old_style)):
        fields = fields_from_hf(file, form)
        assert fields.pop("local_rope") == local
        assert LlamaConfig(**fields) == config
    parameters = read_by(family, written)["rope_parameters"]
    assert parameters["full_attention"]["rope_type"] == rope.kind
    assert parameters["sliding_attention"]["rope_theta"] == local.theta


OLD_STYLE = ("rope_theta", "rope_local_base_freq", "rope_scaling")
GEMMA3 = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}


def test_gemma_3_of_transformers_4_has_scaled_global_and_plain_local_layers():
    ropes = ropes_from_hf(GEMMA3, 4096, LAYERED["Gemma3TextConfig"].defaults["rope_theta"], OLD_STYLE[1])
    assert ropes == {
        "full_attention": Rope(1e6, "linear", 8.0),
        "sliding_attention": Rope(1e4),
    }
    both = {
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}},
        "rope_scaling": GEMMA3["rope_scaling"],
    }
    theirs = read_by("Gemma3TextConfig", both)["rope_parameters"]["full_attention"]
    assert (theirs["rope_theta"], theirs["factor"]) == (1e6, 8.0)
    assert ropes_from_hf(both, 4096, {name: 1e4 for name in ropes}, OLD_STYLE[1]) == ropes
    nothing = ropes_from_hf({}, 4096, {"full_attention": 1e6, "sliding_attention": 1e4}, OLD_STYLE[1])
    assert nothing == {"full_attention": Rope(1e6), "sliding_attention": Rope(1e4)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}},
            "rope_local_base_freq of config.json has rope_theta=10000.0, but rope_parameters.sliding",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}},
            "rope_parameters.full_attention has factor=4.0, but rope_scaling",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, "must have one object for full_attention and one"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention must be an object"),
        ({"rope_local_base_freq": "wide"}, "rope_theta of rope_local_base_freq of config.json must be a fin"),
    ],
)
def test_contradictions_between_layer_types_are_one_line(changes, words):
    thetas = {"full_attention": 1e6, "sliding_attention": 1e4}
    with pytest.raises(ValueError) as caught:
        ropes_from_hf({**GEMMA3, **changes}, 4096, thetas, "rope_local_base_freq")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_yarn_and_dynamic_extend_may_be_used():
    """max_position_embeddings is the original length in files whose user added rope_scaling."""
    for file in ({"type": "dynamic", "factor": 4.0}, {**YARN, "original_max_position_embeddings": 16384}):
        assert FAMILIES["llama"].from_hf({**SIZES, "rope_scaling": file}).max_positions == 65536
    assert FAMILIES["llama"].from_hf({**SIZES, "rope_scaling": LINEAR}).max_positions == 16384


@pytest.mark.quick_cases("dynamic")
@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_logits_beyond_the_original_length_equal_transformers_and_decoding(kind, tmp_path):
    parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    reference = tiny_torch(rope_parameters=parameters, max_position_embeddings=16)
    folder = str(write_folder(tmp_path, reference))
    model = pretrained.model_for(folder, dtype=jnp.float32)
    params = load_on_host(folder, model, lambda path, x: jnp.asarray(x))
    tokens = some_tokens(time=24)
    ours = our_logits(model, params, tokens)
    np.testing.assert_allclose(ours, torch_logits(reference, tokens), atol=1e-4)
    prompts = jax.tree.map(lambda x: x[:, :20], tokens)
    h, cache = prefilled(model, params, prompts, 4)
    found, decode = [np.asarray(model.logits(model.head(params), h))], jax.jit(partial(decoded, model))
    for t in range(20, 24):
        at = jnp.full(2, t, jnp.int32)
        h, cache = decode(params, cache, (tokens.ids[:, t], at), t - 20)
        found.append(np.asarray(model.logits(model.head(params), h))[:, None])
    np.testing.assert_allclose(np.concatenate(found, 1), ours, atol=1e-4)


SHORT = tuple(1 + i / 4 for i in range(4))
BY_LENGTH = {
    "dynamic": Rope(kind="dynamic", factor=4.0, original_max_positions=8),
    "longrope": Rope(
        kind="longrope", factor=4.0, original_max_positions=8, short_factor=SHORT, long_factor=SHORT[::-1]
    ),
}


@pytest.mark.quick_cases("longrope")
@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_packed_row_has_the_hidden_states_of_its_examples_alone_on_one_device_and_a_mesh(kind, x64):
    model = llama(replace(tiny_model.CONFIG, rope=BY_LENGTH[kind]), jnp.float64)
    params = param_spec.init_params(model.specs, jax.random.key(0), jnp.float64)
    first, second = (np.random.default_rng(3).integers(0, 40, n) for n in (6, 14))
    tokens, hidden = rows_of_examples([[first, second], [second, first]], 24), jax.jit(model.hidden)
    found = np.asarray(hidden(params, tokens)[0])
    alone = [np.asarray(hidden(params, rows_of_examples([[x]], len(x)))[0])[0] for x in (first, second)]
    np.testing.assert_allclose(found[0, :20], np.concatenate(alone), rtol=1e-10)
    np.testing.assert_allclose(found[1, :20], np.concatenate(alone[::-1]), rtol=1e-10)
    mesh = make_mesh(MeshShape(2, context=4))
    with jax.set_mesh(mesh):
        batch = shard_batch(mesh, jax.tree.map(lambda x: x[None], tokens))
        sharded = jax.device_get(
            jax.jit(lambda p, b: model.hidden(p, jax.tree.map(lambda x: x[0], b))[0])(params, batch)
        )
    real = np.asarray(tokens.segments) > 0
    np.testing.assert_allclose(sharded[real], found[real], rtol=1e-9, atol=1e-12)


def rows_of_examples(rows, size):
    """Rows of several examples each, padded to `size` tokens."""
    ids, segments, positions = (np.zeros((len(rows), size), np.int32) for _ in range(3))
    for r, row in enumerate(rows):
        ends = np.cumsum([len(example) for example in row])
        for i, (example, end) in enumerate(zip(row, ends, strict=True)):
            at = slice(end - len(example), end)
            ids[r, at], segments[r, at], positions[r, at] = example, i + 1, np.arange(len(example))
    return Tokens(ids, segments, positions, positions, ids, np.ones(ids.shape))


def test_a_file_of_transformers_5_gains_what_transformers_4_reads():
    new = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **LONG}
    del new["type"]
    lists = {name: LONG[name] for name in ("short_factor", "long_factor")}
    assert for_transformers_4(new, "phi3") == {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", **lists},  # Phi-3 of transformers 4 refuses a fourth setting
    }
    layered = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": None}
    assert for_transformers_4(layered, "gemma3_text") == {"rope_theta": 1e6, "rope_scaling": None}
    with pytest.raises(ValueError, match="without RoPE"):
        rope_to_hf(Rope(kind="none"), 1024, "smollm3")
