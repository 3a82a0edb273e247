"""A run's configuration, folder, record, checkpoints and log.

config.py: load a recipe
parse.py: parse settings
record.py: settings as JSON, for a run's record
folder.py: lock, resume rules, hashes of results
interrupt.py: SIGTERM and other signals
environment.py: versions, flags and devices of each start
bug_report.py: facts about the machine for bug reports
named_weights.py: the weights that --run, --model and --adapter name
loaded_weights.py: named weights, loaded for inference
option_names.py: options of TRL, PEFT, Axolotl, LLaMA-Factory and Unsloth, and the settings that do the same
unknown_names.py: what to write for an unknown name or file of other tools
settings_list.py: all settings as `jaxft settings` lists them
named_losses.py: losses that a command line names
checkpoint.py: verified checkpoints, written and read
manifest.py: hashes of a checkpoint's files
store.py: object stores
store_copy.py: the copy of a run's folder in an object store, which commands may name
log.py: the log
ranking.py: which of several runs is best: seeds together, differences on the same held-out rows
report.py: start-up lines and model card
compare.py: comparison of runs
plots.py: plots of metrics
metric_names.py: names of metrics
push.py: which files of a run are pushed to the hub, and with which card
served.py: the models of the server and the chat: a base with any number of adapters
charts.py: which metrics are drawn together, with titles and units; a run's pictures
commands.py: the command `jaxft`, which runs the scripts
completion.py: the shell's completion of the command
setting_sources.py: settings read from source, without importing jax
documentation.py: sections of README files as topics of `jaxft help`, docstrings of recipes
cli.py: parser, one-line errors and exit codes of every command
terminal.py: text that is safe to print, output to a console that may end
"""
