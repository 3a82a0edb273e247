"""Building blocks of models: parameters, matmuls, attention, LoRA and quantised weights."""
