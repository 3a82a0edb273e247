"""Parameters from one spec tree: keys by path, published parameter counts, consistent shapes, shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG

from jaxft.distributed.sharding import AXES, MeshShape, make_mesh
from jaxft.models.families.llama import PRESETS, llama
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.param_spec import ParamSpec, fan_in, full, kaiming_uniform, normal
from jaxft.train import trainable_params

COUNTS = {  # as Hugging Face's model pages and transformers' num_parameters() give them
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_published_number_of_parameters(name):
    specs = llama(PRESETS[name]).specs
    assert param_spec.count_params(specs) == COUNTS[name]


def test_every_preset_is_among_the_counted_sizes():
    assert {param_spec.count_params(llama(config).specs) for config in PRESETS.values()} == set(
        COUNTS.values()
    )


def test_flops_are_two_per_weight_and_token_plus_causal_attention():
    c = PRESETS["meta-llama/Llama-3.1-8B"]
    products = (
        param_spec.count_params(llama(c).specs) - c.vocab * c.width - (2 * c.layers + 1) * c.width
    )  # no table, no norms
    per_token = llama(c).forward_flops(1, 0)
    assert per_token == 2 * products
    assert llama(c).forward_flops(10, 2048) == 10 * (
        per_token + 2 * c.layers * 2 * c.heads * c.head_dim * 2048 / 2
    )


def test_a_leaf_depends_on_the_key_and_its_path_only():
    specs = {
        "a": ParamSpec((4, 5), ("width", "mlp"), normal(1.0)),
        "b": ParamSpec((4, 5), ("width", "mlp"), normal(1.0)),
    }
    key = jax.random.key(0)
    found = param_spec.init_params(specs, key)
    more = param_spec.init_params({"0": specs["a"], **specs, "a0": specs["a"]}, key)
    np.testing.assert_array_equal(found["a"], more["a"])
    np.testing.assert_array_equal(found["b"], more["b"])
    leaves = [
        found["a"],
        found["b"],
        more["0"],
        more["a0"],
        param_spec.init_params(specs, jax.random.key(1))["a"],
    ]
    flat = np.stack([np.ravel(x) for x in leaves])
    assert np.all(np.abs(np.corrcoef(flat) - np.eye(5)) < 0.95) and len(np.unique(flat)) == flat.size


def test_no_two_parameters_of_a_model_share_a_key():
    t = trainable_params.partition_params(
        llama(PRESETS["meta-llama/Llama-3.1-8B"]), Adapter(targets=("q", "head")), None
    )
    paths = list(param_spec.spec_paths(t.specs))
    assert len({param_spec.path_hash(path) for path in paths}) == len(paths)


def test_layers_of_a_stacked_leaf_differ():
    q = param_spec.init_params({"q": llama(CONFIG).specs["layers"]["attn"]["q"]}, jax.random.key(0))["q"]
    assert len(np.unique(q)) > 0.99 * q.size


@pytest.mark.parametrize(
    "init, std, largest",
    [
        (normal(0.02), 0.02, None),
        (fan_in(400), 0.05, None),
        (kaiming_uniform(400), 0.05 / 3**0.5, 0.05),
        (full(3.0), 0.0, 3.0),
    ],
    ids=["normal", "fan_in", "kaiming_uniform", "constant"],
)
def test_initialisers_have_their_spread_and_dtype(init, std, largest):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = np.asarray(init(jax.random.key(0), (100, 200), dtype))
        assert x.dtype == dtype
        assert np.std(x.astype(np.float64)) == pytest.approx(std, rel=0.02)
        assert largest is None or np.abs(x).max() <= largest * 1.005


def test_a_kernel_has_an_axis_of_inputs_and_one_of_outputs():
    """Several values of each channel are no matrix, as those of a depthwise convolution."""
    for axes, is_kernel in [
        (("layers", "experts", "width", "mlp"), True),
        (("vocab", "table_width"), True),
        (("layers", "mlp", "taps"), False),
        (("layers", "heads", "head_dim"), False),
        (("layers", "norm"), False),
    ]:
        assert (param_spec.kernel(ParamSpec((2,) * len(axes), axes, full(0.0))) is not None) == is_kernel


def test_a_spec_names_every_dimension():
    with pytest.raises(ValueError, match="needs 3 axis names"):
        ParamSpec((2, 3, 4), ("width", "mlp"), full(0.0))


def test_every_axis_of_every_spec_is_in_the_table():
    t = trainable_params.partition_params(llama(CONFIG), Adapter(targets=("q", "head")), None)
    assert {axis for s in param_spec.spec_paths(t.specs).values() for axis in s.axes} <= AXES.keys()


def test_parameters_have_the_shapes_of_their_specs_and_a_sharding_each():
    specs = llama(CONFIG).specs
    real = jax.eval_shape(lambda: param_spec.init_params(specs, jax.random.key(0), jnp.bfloat16))
    shapes = {path: spec.shape for path, spec in param_spec.spec_paths(specs).items()}
    assert {path: x.shape for path, x in tree.paths(real).items()} == shapes
    for path, place in tree.paths(param_spec.shardings(specs, make_mesh(MeshShape(2, 2, 2)))).items():
        assert place.shard_shape(tree.paths(real)[path].shape)


def test_the_parameter_table_lists_every_parameter_and_the_totals():
    t = trainable_params.partition_params(
        llama(PRESETS["meta-llama/Llama-3.2-1B"]), Adapter(rank=8, targets=("q", "v")), None
    )
    lines = trainable_params.parameter_table(t).splitlines()
    assert len(lines) == len(param_spec.spec_paths(t.specs)) + 1
    some = 16 * 8 * (2048 + 2048 + 2048 + 512)
    assert lines[-1].startswith(f"{some:,} of {1_235_814_400 + some + 2 * 16:,} parameters are trained (")
    assert [line.split()[-1] for line in lines if line.startswith("adapter/layers/attn/q/")] == [
        "trained",
        "trained",
        "frozen",
    ]
    assert all(line.endswith("frozen") for line in lines if line.startswith("base/"))
