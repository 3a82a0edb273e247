"""Settings of a run: a recipe and its settings from a command line, and their record.

config.py: load a recipe and apply `name=value`; an unknown name's error has the nearest known ones
option.py: an option of another tool, and how rows of the table are written
option_names.py: options of TRL, PEFT, Axolotl, LLaMA-Factory and Unsloth, and the settings that do the same
setting_values.py: values parsed by their annotations, and recorded as JSON
settings_list.py: all settings as `jaxft settings` lists them
setting_names.py: names read from a recipe's source, and advice for options and files of other tools
"""
