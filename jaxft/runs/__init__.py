"""A run's configuration, folder, record, checkpoints and log.

folder.py: lock, resume rules, hashes of results
interrupt.py: SIGTERM and other signals
environment.py: versions, flags and devices of each start
bug_report.py: facts about the machine for bug reports
named_weights.py: the weights that --run, --model and --adapter name
loaded_weights.py: named weights, loaded for inference
checkpoint.py: verified checkpoints, written and read
manifest.py: hashes of a checkpoint's files
log.py: the log
chained_log.py: digests of logs, by which a changed line is found
metric_names.py: names of metrics
terminal.py: text that is safe to print, output to a console that may end
run_texts.py: start-up lines and model card
"""
