"""Configurations of other tools as recipes of jaxft.

yaml_and_shell.py: YAML, command lines and shell scripts
rows_and_batches.py: datasets, templates, rows of a step, schedules, rollouts
python_files.py: options in Python files and notebooks
python_rows.py: the datasets that Python files and notebooks load
conversion_text.py: a conversion as a command, a report and a recipe
draft.py: the options that a file gives, and a conversion under way; no file is executed
to_recipe.py: converts a configuration of another tool to a recipe with settings
"""
