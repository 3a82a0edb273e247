"""Data: files, row formats, chat templates, loss masks, packing and sources of batches.

source.py: the Source type; RowSource, batches of fixed rows; BatchLayout, how rows become batches
row_settings.py: the settings that a row's token ids depend on, with the settings of chat templates
progress.py: progress lines of a long pass over rows, durations as text
sft.py: SFT rows, and solutions in steps with labels: settings, packing; rows of a plan as arrays: segments,
    positions, weights of tokens that sum to 1
decisions.py: questions with choices: rows and prompts
decision_rows.py: tokens and batches of questions
pairs.py: preference rows: settings and source
prompts.py: prompts for rollouts: settings (also of sampling and of updates per rollout), split, order
inspection.py: a dataset as `jaxft inspect` and reports show it: statistics, examples, invalid and repeated
    rows; lengths of untruncated rows, what each length limit keeps and costs
data_settings.py: settings of all kinds of data
rows/: files and formats of rows, mixtures, checks of rows
chat/: chat templates, tool calls, loss masks
packing/: rows as token ids: truncation, packing, the cache
"""
