"""Data: files, row formats, chat templates, loss masks, packing and sources of batches.

settings.py: settings of all kinds of data
source.py: the Source type, the source of fixed rows and what a layout of its batches is
shipped.py: where recipes, their rows and scripts are, in a clone or an installed wheel
invalid.py: the error of an invalid row, and what becomes of it
rows.py: files, folders and hub datasets
row_files.py: the rows of files, in chunks
row_parquet.py: rows of Parquet files within limits of memory
row_csv.py: rows of CSV and TSV files
row_text.py: text and Markdown as documents
text_encoding.py: the encoding of a text file
remote.py: Parquet behind URLs
urls.py: URLs of rows, removal of passwords and signatures
formats.py: the table of row formats and how each is read
published_formats.py: rankings, comparisons and transcripts, rewritten into the columns of other formats
format_choice.py: the format of a dataset
example.py: rows as they are read
loss_weights.py: weights of rows and messages in the loss
mixture.py: several sources with weights, training and held-out rows
columns.py: columns by their names, as messages and tools
conversation.py: a row's prompt and responses, the same for every stage
named_templates.py: chat templates by name for base models
chat.py: tokens and loss masks of examples
template.py: chat templates
template_settings.py: how a run renders them
next_turn.py: the tokens between two turns of a conversation that a model continues
turns.py: the assistant turns in a rendered text
template_check.py: the check that a template shows all of a turn
rejections.py: remedies for rows that a chat template rejects
reader.py: a dataset as token ids, chunk by chunk in several processes
row_settings.py: the settings that token ids depend on
progress.py: progress of work that takes long
tokenised.py: tokenised rows: a prompt and its continuations
cache.py: files of tokenised rows
flat.py: arrays in memory-mapped parts, names of rows
pack.py: packing plans
epochs.py: the length of a run
sft.py: SFT rows: settings, packing, rows of a plan as arrays
sft_tokens.py: tokens of SFT rows
decisions.py: questions with choices: rows and prompts
decision_rows.py: tokens and batches of questions
steps.py: solutions in steps with labels: settings and tokens
pairs.py: preference rows: settings and source
pair_tokens.py: tokens of preference rows
pair_plan.py: which pairs share a batch
pair_layout.py: pairs in rows of tokens
prompts.py: prompts for rollouts: settings, split, order
prompt_tokens.py: tokens and columns of prompts
summary.py: a run's data as JSON for its report; token ids as text, token by token
lengths.py: tokens of rows before a limit, what each limit keeps and costs; the alarm about rows that are left
    out
overlaps.py: rows that repeat one another, held-out rows that are training rows
left_out.py: rows that data.drop leaves out
inspection.py: a dataset as `jaxft inspect` shows it: statistics, examples, invalid rows
"""
