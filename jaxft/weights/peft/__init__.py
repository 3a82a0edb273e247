"""Adapters in PEFT's layout.

adapter_folders.py: adapters in folders: their settings, weights, and the base that they were trained on
peft_read.py: read an adapter; the adapters of PiSSA and OLoRA that PEFT has not converted
peft_write.py: write an adapter: adapter_config.json and its tensors
peft_config.py: read adapter_config.json and check it; names of tensors
peft_tensors.py: LoRA pairs and parameters trained in full, and the fields that declare them
"""
