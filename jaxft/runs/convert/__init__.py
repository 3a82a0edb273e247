"""Configurations of Axolotl, LLaMA-Factory, TRL and Unsloth as commands and recipes of jaxft.

A file is read without being executed (source.py, yaml_files.py, command_lines.py, python_files.py) into the
options that it gives. settings.py turns these into a recipe with settings and into lines about what is
expressed otherwise and what cannot be, by the table runs/option_names.py; data_sets.py and batches.py do so
for options that belong together. recipe_file.py writes a recipe.
"""
