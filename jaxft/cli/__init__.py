"""The command `jaxft` and the setup of its scripts.

cli.py: parser, one-line errors and exit codes of every command
commands.py: the command `jaxft`, which runs the files of scripts/, where options are declared; its shell
    completion, topics of `jaxft help`
help_page.py: the reference that `jaxft settings` and `jaxft help` print
"""
