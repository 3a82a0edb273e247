"""A tiny Llama with 16 adapters behind the scheduler: programs are compiled once in a process."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import tiny_tokenizers

from jaxft.engine.sampling import Sampling
from jaxft.engine.scheduler import Scheduler, ServeSizes, TokenRequest, compile_server
from jaxft.engine.session import RequestSettings
from jaxft.models.adapted import adapted_by_row
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_rows import stack_by_row, with_gains
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.serve.served_models import ServedModel
from jaxft.weights.edit.lora_start import init_magnitudes

TOKENIZER = tiny_tokenizers.tiny("chatml")
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + tiny_tokenizers.CHATML.replace(
    "message['content']", "(message['content'] or '')"
)
STOP = (TOKENIZER.eos_token_id, *range(20, len(TOKENIZER), 60))
SIZES = ServeSizes(rows=4, prompt=128, new=24, stops=16, block=3)
ADAPTERS = {
    "polite": Adapter(rank=4, alpha=8.0, targets=("q", "v")),
    "terse": Adapter(rank=2, alpha=4.0, targets="all-linear"),
}
# Of other ranks and kinds, in the same programs; `models` does not name them.
OTHERS = {
    "one": Adapter(rank=1, alpha=2.0, targets=("q",)),
    "eight": Adapter(rank=8, alpha=8.0),
    "negative": Adapter(rank=2, alpha=-3.0, targets=("up",)),
    "rslora": Adapter(rank=3, alpha=3.0, targets=("gate", "down"), rslora=True),
    "a layer": Adapter(rank=4, alpha=8.0, targets=("q", "o"), layers_to_transform=(1,)),
    "ranks": Adapter(rank=2, alpha=4.0, targets=("k", "v"), rank_pattern=(("k", 5),)),
    "dora": Adapter(rank=4, alpha=8.0, dora=True),
    "dora of a layer": Adapter(rank=1, alpha=2.0, targets=("v",), layers_to_transform=(0,), dora=True),
    "dora of the head": Adapter(rank=3, alpha=3.0, targets=("q", "head"), dora=True),
    "head": Adapter(rank=2, alpha=2.0, targets=("head",)),
    "q and head": Adapter(rank=5, alpha=5.0, targets=("q", "head")),
    "embeddings": Adapter(rank=2, alpha=2.0, targets=("embed",)),
    "v and embeddings": Adapter(rank=3, alpha=3.0, targets=("v", "embed")),
    "all": Adapter(rank=2, alpha=2.0, targets=("down", "embed", "head")),
}
MODEL = llama(
    LlamaConfig(
        vocab=len(TOKENIZER), width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, max_positions=256
    ),
    jnp.float32,
)


@functools.cache
def base():
    """Random weights that are large enough for completions to differ."""
    started = jax.jit(lambda: param_spec.init_params(MODEL.specs, jax.random.key(0), jnp.float32))()
    return jax.tree.map(lambda x: 2 * x, started)


@functools.cache
def adapter(name):
    """A random adapter whose b is not zero; with DoRA its magnitudes are near the norms of the weights."""
    specs = adapter_specs(MODEL.specs, (ADAPTERS | OTHERS)[name], MODEL.weight_names)
    fresh = param_spec.init_params(specs, jax.random.key(len(name)), jnp.float32)
    keys = iter(jax.random.split(jax.random.key(1), 100))

    def grown(path, x):
        if not path.endswith(("/a", "/b")):
            return x
        values = 0.3 * jax.random.normal(next(keys), x.shape)
        is_used = x != 0 if path.startswith("layers/") and path.endswith("/a") else True
        return jnp.where(is_used, values, jnp.zeros_like(values))

    pairs = tree.map_with_path(grown, fresh)
    return tree.map_with_path(
        lambda path, x: (
            x * (1 + 0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)))
            if path.endswith("/magnitude")
            else x
        ),
        init_magnitudes(base(), pairs),
    )


@functools.cache
def params():
    """Base and stack."""
    return {
        "base": base(),
        "stack": jax.tree.map(
            jnp.asarray, stack_by_row([with_gains(base(), adapter(name)) for name in ADAPTERS | OTHERS])
        ),
    }


@functools.cache
def engine():
    """The engine of the server."""
    return compile_server(adapted_by_row(MODEL), SIZES, params())


CHAT = dataclasses.replace(SIZES, continues=True)


@functools.cache
def chat_engine():
    """The same for rows that go on."""
    return compile_server(adapted_by_row(MODEL), CHAT, params())


def models(tokenizer=TOKENIZER):
    """The base and its adapters by name."""
    names = {"base": 0, **{name: number for number, name in enumerate(ADAPTERS, 1)}}
    return {
        name: ServedModel(name, tokenizer, STOP, len(TOKENIZER), number, tools="hermes")
        for name, number in names.items()
    }


@functools.cache
def tool_models():
    """`models` with a chat template that renders tools."""
    tokenizer = tiny_tokenizers.tiny.__wrapped__("chatml")
    tokenizer.chat_template = TOOL_TEMPLATE
    return models(tokenizer)


def scheduler(queue=64, own=None, sizes=SIZES):
    """A running scheduler, and the lines that it logs."""
    lines = []
    found = Scheduler(own or engine(), sizes, params(), queue, lines.append)
    found.start()
    return found, lines


def request(prompt, seed=0, **options):
    """A request for 12 tokens at temperature 0.8, top_k 20 and top_p 0.9, or as `options` say."""
    sampling = Sampling(**{"max_new": 12, "temperature": 0.8, "top_k": 20, "top_p": 0.9, **options})
    return TokenRequest(tuple(prompt), RequestSettings(sampling, STOP), seed)


def text_of(ids):
    """The text of a completion: no stop token at its end, and no special tokens."""
    return TOKENIZER.decode(ids[: len(ids) - (ids[-1] in STOP)], skip_special_tokens=True)


class Collected:
    """What the scheduler delivers to one request."""

    def __init__(self):
        self.tokens, self.progress, self.ended = [], [], threading.Event()

    def __call__(self, progress):
        self.progress.append(progress)
        self.tokens += progress.tokens
        if progress.finish:
            self.ended.set()

    @property
    def ids(self):
        return [token.token for token in self.tokens]

    @property
    def finish(self):
        return self.progress[-1].finish


def complete(scheduler, requests):
    """The Collected of each request, after all have ended."""
    found = [Collected() for _ in requests]
    scheduler.submit(list(zip(requests, found, strict=True)))
    for one in found:
        assert one.ended.wait(60)
    return found


class Gate:
    """Holds the scheduler's thread in its deliveries until `open` is set."""

    def __init__(self):
        self.open, self.holds = threading.Event(), threading.Event()

    def __call__(self, deliver):
        def gated(progress):
            self.holds.set()
            self.open.wait(30)
            deliver(progress)

        return gated
