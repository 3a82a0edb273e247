"""Adapters in PEFT's layout.

adapters.py: the adapter of a run's folder
peft.py: PEFT adapters in
peft_modules.py: what an adapter trains in full
peft_names.py: names of tensors in other adapters' files
peft_pairs.py: LoRA pairs and their ranks as PEFT's patterns
peft_refusals.py: PEFT adapters that are refused
peft_residual.py: PiSSA and OLoRA adapters that PEFT has not converted
peft_write.py: PEFT adapters out
"""
