"""Rows before they are tokenised: files, hub datasets, formats, columns, mixtures.

columns.py: columns by their names, as messages and tools
conversation.py: a row's prompt and responses, the same for every stage
dataset_rows.py: files, folders and hub datasets
example.py: rows as they are read; weights of rows and messages in the loss
format_choice.py: the format of a dataset
formats.py: the table of row formats and how each is read
invalid.py: the error of an invalid row, and what becomes of it
mixture.py: several sources with weights, training and held-out rows
published_formats.py: rankings, comparisons and transcripts, rewritten into the columns of other formats
remote.py: URLs of rows, Parquet behind them
row_files.py: the rows of files, in chunks
row_parquet.py: rows of Parquet files within limits of memory
text_files.py: CSV and TSV, text and Markdown as documents, encodings
shipped.py: where recipes, their rows and scripts are, in a clone or an installed wheel
"""
