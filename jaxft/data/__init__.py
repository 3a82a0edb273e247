"""Data: files, row formats, chat templates, loss masks, packing and sources of batches.

source.py: the Source type, the source of fixed rows and what a layout of its batches is
row_settings.py: the settings that token ids depend on, also of chat templates
progress.py: progress of work that takes long
sft.py: SFT rows, and solutions in steps with labels: settings, packing, rows of a plan as arrays
decisions.py: questions with choices: rows and prompts
decision_rows.py: tokens and batches of questions
pairs.py: preference rows: settings and source
prompts.py: prompts for rollouts: settings, split, order
inspection.py: a dataset as `jaxft inspect` and reports show it: statistics, examples, invalid and repeated
    rows; tokens of rows before a limit, what each limit keeps and costs
data_settings.py: settings of all kinds of data
"""
