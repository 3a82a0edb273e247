"""Chunked log-probs: log_softmax in value and gradient, without its memory, products or collectives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, assert_close

from jaxft.distributed import sharding
from jaxft.models.adapted import adapted
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import quantize
from jaxft.objectives import logprobs
from jaxft.objectives.logprobs import HeadInput, logps_of_heads, token_logps, weighted_loss
from jaxft.objectives.read_positions import gather_read

B, M, D, V = 8, 7, CONFIG.width, CONFIG.vocab
ADAPTER = Adapter(rank=4, targets=("head",))
HEADS = {
    "untied": (False, False),
    "tied": (True, False),
    "untied-lora": (False, True),
    "tied-lora": (True, True),
}
heads = pytest.mark.parametrize("tied, lora", HEADS.values(), ids=HEADS)


pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def setting(tied, lora, dtype="float64"):
    """Return a model, its head's parameters, hidden states, targets and weights of the log-probs (also
    negative).
    """
    model = adapted(
        llama(LlamaConfig(**{**CONFIG.__dict__, "tied": tied}), jnp.dtype(dtype)), ADAPTER if lora else None
    )
    rng = np.random.default_rng(3)
    random = lambda *shape: jnp.asarray(rng.normal(0, 0.3, shape), dtype)  # noqa: E731
    whole = {"base": {"embed": random(V, D)} if tied else {"head": random(D, V)}}
    if lora:
        whole["adapter"] = {"head": {"a": random(D, 4), "b": random(4, V), "scale": jnp.asarray(0.7, dtype)}}
    h = 4 * random(B, M, D)
    likely = plain(whole, h, jnp.zeros((B, M), jnp.int32))[1].argmax(-1)  # right answers in every other row
    targets = jnp.where(
        jnp.arange(B)[:, None] % 2 == 0, likely, jnp.asarray(rng.integers(0, V, (B, M)))
    ).astype(jnp.int32)
    return model, whole, h, targets, random(B, M)


@jax.jit
def plain(whole, h, targets):
    """The same by one product, one log_softmax and autodiff; and the logits."""
    base = whole["base"]
    logits = h @ (base["head"] if "head" in base else base["embed"].T)
    if "adapter" in whole:
        pair = whole["adapter"]["head"]
        logits = logits + pair["scale"] * (h @ pair["a"]) @ pair["b"]
    logp = jax.nn.log_softmax(logits, -1)
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    best = jnp.argmax(logits, -1).astype(targets.dtype) == targets
    at = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    square = jnp.log(jnp.sum(jnp.exp(2 * logp), -1))
    found = logprobs.LogProbs(
        at, jax.nn.logsumexp(logits, -1), entropy, best.astype(h.dtype), square, jnp.mean(logits, -1)
    )
    return found, logits


def loss_of(model, weights, known=False):
    """The weighted sum of log-probs; known: by weighted_loss, which gets the weights."""
    if known:
        return lambda whole, h, targets: -weighted_loss(model, whole, h, targets, weights)[0]
    return lambda whole, h, targets: jnp.sum(weights * token_logps(model, whole, h, targets).logp)


weights_known = pytest.mark.parametrize("known", [False, True], ids=["any-loss", "weighted"])


@pytest.mark.quick_cases("untied-lora-3", "tied-3")
@pytest.mark.parametrize("name, chunk", [*((name, 3) for name in HEADS), ("untied", 1), ("tied-lora", 100)])
def test_log_probs_equal_log_softmax_in_value_and_gradient_for_any_chunk(monkeypatch, name, chunk):
    monkeypatch.setattr(
        logprobs, "CHUNK_LOGITS", B * V * chunk
    )  # 7 positions: 3 chunks of which the last is padded, 7, 1
    model, whole, h, targets, weights = setting(*HEADS[name])

    def both(fn):
        def loss(whole, h):
            found = fn(whole, h)
            return jnp.sum(weights * found.logp), found

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(whole, h)

    (_, found), grads = both(lambda *a: token_logps(model, *a, targets))
    (_, expected), wanted_grads = both(lambda *a: plain(*a, targets)[0])
    assert_close(found, expected)
    assert_close(grads, wanted_grads)
    assert B * M / 2 <= float(jnp.sum(found.top1)) < B * M


@pytest.mark.quick_cases("untied-1", "tied-lora-3")
@pytest.mark.parametrize("name, chunk", [*((name, 3) for name in HEADS), ("untied", 1), ("tied-lora", 100)])
def test_the_gradient_made_in_the_forward_pass_equals_the_pulled_back_one(monkeypatch, name, chunk):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", B * V * chunk)
    model, whole, h, targets, weights = setting(*HEADS[name])

    def both(known):
        loss = lambda whole, h, weights: loss_of(model, weights, known)(whole, h, targets) ** 2  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(whole, h, weights)

    assert_close(both(True), both(False))
    assert_close(weighted_loss(model, whole, h, targets, weights)[1], token_logps(model, whole, h, targets))


@weights_known
def test_the_gradient_of_a_subset_is_that_subset_of_the_gradient(known):
    model, whole, h, targets, weights = setting(False, True)
    loss = loss_of(model, weights, known)
    everything = tree.paths(jax.jit(jax.grad(loss))(whole, h, targets))
    for pattern in ("base/head", "adapter/.*/[ab]"):
        trained, frozen = tree.partition(whole, tree.mask_by_path(whole, pattern))
        grads = jax.jit(jax.grad(lambda t, frozen=frozen: loss(tree.combine(t, frozen), h, targets)))(trained)
        for path, g in tree.paths(grads).items():
            assert_close(g, everything[path])


def test_several_heads_in_one_pass_equal_each_alone_and_only_the_first_has_a_gradient(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", B * V * 3)
    model, whole, h, targets, weights = setting(False, True)
    tied, table, other_h, _, _ = setting(True, False)
    rng = np.random.default_rng(8)
    wide = llama(LlamaConfig(**{**CONFIG.__dict__, "width": D + 3, "vocab": V + 5}), jnp.float64)
    own, wide_h = {"head": rng.normal(0, 0.3, (D + 3, V + 5))}, rng.normal(0, 1, (B, M, D + 3))
    frozen = [HeadInput(tied, table, -2 * other_h), HeadInput(wide, own, jnp.asarray(wide_h))]

    @jax.jit
    def together(whole, h, table):
        others = [frozen[0]._replace(params=table), frozen[1]]

        def loss(whole, h, table):
            found = logps_of_heads([HeadInput(model, whole, h), *others], targets)
            return jnp.sum(weights * sum(one.logp for one in found)), found

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(whole, h, table)

    (_, found), (*grads, of_table) = together(whole, h, table)
    alone = [token_logps(*one, targets) for one in (HeadInput(model, whole, h), *frozen)]
    assert_close(found, tuple(alone))
    assert_close(grads, list(jax.jit(jax.grad(loss_of(model, weights), (0, 1)))(whole, h, targets)))
    assert not any(np.any(x) for x in jax.tree.leaves(of_table))


def test_only_logp_has_a_gradient():
    model, whole, h, targets, _ = setting(False, False)

    def others(whole, h):
        found = token_logps(model, whole, h, targets)
        return jnp.sum(found.lse + found.entropy + found.top1 + found.log_sum_p2 + found.mean_logit)

    assert all(
        np.all(np.asarray(g) == 0) for g in jax.tree.leaves(jax.jit(jax.grad(others, (0, 1)))(whole, h))
    )


def test_equal_logits_give_the_uniform_distribution_and_huge_ones_stay_finite():
    model, whole, h, targets, _ = setting(False, False)

    def total(h):
        found = token_logps(model, whole, h, targets)
        return jnp.sum(found.logp), found

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, found), _ = run(jnp.zeros_like(h))
    uniform = logprobs.LogProbs(-np.log(V), np.log(V), np.log(V), 1.0, -np.log(V), 0.0)
    assert_close(found, jax.tree.map(lambda x, value: jnp.full_like(x, value), found, uniform))
    (value, _), grad = run(1e6 * h)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_packed_head_equals_the_plain_one_bit_for_bit(tied):
    model, whole, h, targets, _ = setting(tied, False, "bfloat16")
    packed = {"base": jax.tree.map(lambda x: quantize(x, "bits"), whole["base"])}
    run = jax.jit(jax.value_and_grad(lambda h, whole: jnp.sum(token_logps(model, whole, h, targets).logp)))
    jax.tree.map(np.testing.assert_array_equal, run(h, packed), run(h, whole))


def test_vmapped_adapters_on_one_base_equal_each_alone(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", B * V * 3)
    model, whole, h, targets, weights = setting(True, True)
    pair = whole["adapter"]["head"]
    factors = np.array([1.0, -1.0, 2.0])[:, None, None]
    some = {"a": factors * pair["a"][None], "b": jnp.stack([pair["b"]] * 3)}
    hs = factors[..., None] * h[None]

    def loss(some, h):
        return loss_of(model, weights)(
            {**whole, "adapter": {"head": {**some, "scale": pair["scale"]}}}, h, targets
        )

    each = jax.value_and_grad(loss, (0, 1))
    alone = jax.jit(lambda *x: jax.lax.map(lambda one: each(*one), x))(some, hs)
    assert_close(jax.jit(jax.vmap(each))(some, hs), alone)


def products(compiled):
    """(operand and result shapes) of the matrix products in a compiled program."""
    return [
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"= f\d+\[([\d,]+)\]\S* dot\(", compiled.as_text())
    ]


@heads
@weights_known
def test_the_backward_pass_of_a_frozen_head_has_no_matmul_of_the_logits_size(monkeypatch, tied, lora, known):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", B * V * 3)
    model, whole, h, targets, weights = setting(tied, lora)
    by_h = jax.jit(jax.grad(loss_of(model, weights, known), 1)).lower(whole, h, targets).compile()
    # one product for the logits and one for the gradient by h; an adapter has a and b, each with a gradient
    # by its input
    assert len(products(by_h)) == (6 if lora else 2)
    if not tied and not lora:
        everything = (
            jax.jit(jax.grad(loss_of(model, weights, known), (0, 1))).lower(whole, h, targets).compile()
        )
        assert len(products(everything)) == (3 if known else 4)


@weights_known
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_on_a_frozen_head_costs_no_gradient_of_the_head(monkeypatch, tied, known):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", B * V * 3)
    model, whole, h, targets, weights = setting(tied, True)

    def loss(adapter, base):
        return loss_of(model, weights, known)({"base": base, "adapter": adapter}, h, targets)

    shapes = products(jax.jit(jax.grad(loss)).lower(whole["adapter"], whole["base"]).compile())
    assert not {s for s in shapes if s[-2:] in ((D, V), (V, D))} and {
        s for s in shapes if s[-2:] in ((4, V), (V, 4))
    }


@weights_known
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_all_logits_never_exist_at_once(monkeypatch, trained, known):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 2**16)
    rows, reads, vocab = 4, 256, 8192
    model = llama(
        LlamaConfig(vocab=vocab, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16), jnp.float32
    )
    shape = jax.ShapeDtypeStruct
    head, h, t = (
        {"head": shape((16, vocab), np.float32)},
        shape((rows, reads, 16), np.float32),
        shape((rows, reads), np.int32),
    )
    loss = loss_of(model, jnp.ones((rows, reads), np.float32), known)
    compiled = jax.jit(jax.grad(loss, (0, 1) if trained else 1)).lower(head, h, t).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * reads * vocab * 4 / 16


def compiled_on(mesh, model, whole, h, targets, weights, by, known=False):
    """The gradient program over arguments sharded as in a run, and those arguments."""
    specs = {name: model.specs[name] for name in whole}
    specs["base"] = {name: specs["base"][name] for name in whole["base"]}

    def rows(x):
        return jax.device_put(
            x, sharding.array_sharding(mesh, ("rows", "time", "act_width")[: x.ndim], x.shape)
        )  # noqa: E731

    args = (jax.tree.map(jax.device_put, whole, param_spec.shardings(specs, mesh)), rows(h), rows(targets))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss_of(model, rows(weights), known), by)).lower(
            *args
        ).compile(), args


@weights_known
@pytest.mark.parametrize("name, shape", [*((name, (2, 2, 2)) for name in HEADS), ("tied", (1, 2, 4))])
def test_a_vocabulary_sharded_head_gives_the_values_of_one_device(monkeypatch, name, shape, known):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", V * 3)
    model, whole, h, targets, weights = setting(*HEADS[name])
    one = jax.jit(jax.value_and_grad(loss_of(model, weights), (0, 1)))(whole, h, targets)
    program, args = compiled_on(
        sharding.make_mesh(sharding.MeshShape(*shape)), model, whole, h, targets, weights, (0, 1), known
    )
    assert_close(jax.device_get(program(*args)), jax.device_get(one))


def collectives(text):
    """(in a loop?, operation, sizes) of every collective of a compiled program."""
    found, entry = [], False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        match = re.search(rf"= (\(?\w+\[.*?) ({kinds})(?:-start)?\(", line)
        if match:
            for dims in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found.append((not entry, match[2], tuple(int(d) for d in dims.split(",") if d)))
    return found


@weights_known
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_on_a_mesh_the_head_is_gathered_once_per_pass_and_logits_never(monkeypatch, tied, known):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", V * 3)
    some = setting(tied, False)
    mesh = sharding.make_mesh(sharding.MeshShape(2, 2, 2))
    for by in (1, (0, 1)):
        found = collectives(compiled_on(mesh, *some, by, known)[0].as_text())
        in_loop = [dims for loop, _, dims in found if loop]
        assert in_loop, "the softmax over a sharded vocabulary needs some"
        assert not [dims for dims in in_loop if {V, V // 2, V // 4, V // 8} & {*dims}]
        whole_head = [op for loop, op, dims in found if not loop and {V, V // 2} & {*dims}]
        assert whole_head.count("all-gather") == 1 and len(whole_head) == (1 if by == 1 else 2)


def test_the_chunk_size_counts_logits_per_device(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", B * V)  # one position a chunk on one device, all 7 on eight
    model, whole, h, targets, _ = setting(False, False)

    def lengths():
        return re.findall(
            r"length=(\d+)", str(jax.make_jaxpr(lambda *a: token_logps(model, *a))(whole, h, targets))
        )  # noqa: E731

    assert set(lengths()) == {"7"}
    with jax.set_mesh(sharding.make_mesh(sharding.MeshShape(2, 2, 2))):
        assert set(lengths()) == {"1"}


def test_read_positions_are_gathered_row_by_row():
    h = jnp.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    read = jnp.array([[4, 0], [1, 1]])
    assert_close(gather_read(h, read, None), jnp.stack([h[0, jnp.array([4, 0])], h[1, jnp.array([1, 1])]]))
