"""jaxft: fine-tune and align Llama-class language models in JAX."""

__version__ = "0.1.0"
