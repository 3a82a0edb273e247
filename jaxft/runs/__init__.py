"""A run's configuration, folder, record, checkpoints and log.

folder.py: lock, resume rules, hashes of results
environment.py: versions, flags and devices of each start, and for bug reports
loaded_weights.py: the weights that --run, --model and --adapter name, loaded for inference
checkpoint.py: verified checkpoints, written and read
manifest.py: hashes of a checkpoint's files
log.py: the log
chained_log.py: digests of logs, by which a changed line is found
metric_names.py: names of metrics
terminal.py: text that is safe to print, output to a console that may end
run_texts.py: start-up lines and model card
object_store.py: copies of a run's folder in object stores
"""
