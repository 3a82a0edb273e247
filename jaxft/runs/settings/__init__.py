"""Settings of a run: a recipe and its settings from a command line, and their record.

config.py: load a recipe
option_names.py: options of TRL, PEFT, Axolotl, LLaMA-Factory and Unsloth, and the settings that do the same
parse.py: parse settings
record.py: settings as JSON, for a run's record
setting_sources.py: settings read from source, without importing jax
settings_list.py: all settings as `jaxft settings` lists them
unknown_names.py: advice for options and files of other tools, and for misspelled settings
"""
