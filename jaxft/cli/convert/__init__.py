"""Configurations of other tools as recipes of jaxft.

batches.py: options that belong together: rows of a step, schedules, rollouts
command_lines.py: shell scripts
conversion_report.py: a conversion as a command with remarks
data_sets.py: datasets and templates
draft.py: a conversion under way
python_files.py: Python files and notebooks
python_rows.py: datasets in Python files
recipe_file.py: a conversion as a recipe
source.py: the options that a file gives; no file is executed
to_recipe.py: a configuration of one of these tools as a recipe with settings
yaml_files.py: YAML
"""
