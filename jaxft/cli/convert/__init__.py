"""Configurations of other tools as recipes of jaxft.

batches.py: options that belong together: rows of a step, schedules, rollouts
yaml_and_shell.py: YAML, command lines and shell scripts
data_sets.py: datasets and templates
python_files.py: Python files and notebooks
python_rows.py: datasets in Python files
conversion_text.py: a conversion as a command, a report and a recipe
draft.py: the options that a file gives, and a conversion under way; no file is executed
to_recipe.py: a configuration of one of these tools as a recipe with settings
"""
