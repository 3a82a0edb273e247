"""Rows before they are tokenised: files, hub datasets, formats, columns, mixtures.

columns.py: names of columns and their synonyms; columns as text, tools and messages, whose roles it checks
conversation.py: splits a row's messages into a prompt and responses, the same for every stage
dataset_rows.py: files, folders and hub datasets
example.py: rows as they are read; which turns are trained (`loss_on`), weights of rows and messages
format_choice.py: the choice of a dataset's format by its columns
formats.py: the table of row formats and how each is read
invalid_rows.py: the error of an invalid row, counts of invalid rows that are left out
mixture.py: several sources with weights, training and held-out rows
published_formats.py: rankings, comparisons and transcripts, rewritten into the columns of other formats
remote_files.py: rows behind URLs, such as Parquet files
row_files.py: the rows of files, in chunks
row_parquet.py: rows of Parquet files, read in bounded memory
text_files.py: CSV and TSV, text and Markdown as documents, encodings
shipped.py: where recipes, their rows and scripts are, in a clone or an installed wheel
"""
