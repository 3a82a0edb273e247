"""`jaxft convert`: configurations of other tools as recipes of jaxft. No file is executed.

to_recipe.py: reads a file by its suffix, and converts its options to a recipe with settings
draft.py: types: an option, the options of a file, a conversion in progress
yaml_and_shell.py: reads options from YAML, command lines and shell scripts
python_files.py: reads options from Python files and notebooks
python_rows.py: reads which datasets Python files and notebooks train on
rows_and_batches.py: converts options of datasets, chat templates, batches, schedules and rollouts
conversion_text.py: a conversion as a command, as a report and as a recipe file
"""
