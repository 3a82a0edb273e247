"""Configurations of Axolotl, LLaMA-Factory, TRL and Unsloth as commands and recipes of jaxft.

settings.py: a configuration of one of these tools as a recipe with settings
source.py: the options that a file gives; no file is executed
yaml_files.py: YAML
command_lines.py: shell scripts
python_files.py: Python files and notebooks
python_rows.py: datasets in Python files
draft.py: a conversion under way
batches.py: options that belong together: rows of a step, schedules, rollouts
data_sets.py: datasets and templates
report.py: a conversion as a command with remarks
recipe_file.py: a conversion as a recipe
"""
