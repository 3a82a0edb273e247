"""The command line `jaxft`: parsers, help, shell completion, and `jaxft convert`.

cli.py: the parser that all scripts share, and the options that several of them have
commands.py: the entry point `jaxft`, which runs the files of scripts/, where options are declared; shell
    completion, rows of `jaxft list`, topics of `jaxft help`
help_page.py: the reference that `jaxft settings` and `jaxft help` print
convert/: configurations of TRL, Axolotl, LLaMA-Factory and Unsloth as recipes
"""
