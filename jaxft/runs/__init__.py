"""A run's configuration, folder, record, checkpoints and log.

run_record.py: lock, resume rules, hashes of results
versions_and_devices.py: versions, flags and devices of each start, and for bug reports
loaded_weights.py: the weights that --run, --model and --adapter name, loaded for inference
checkpoint.py: verified checkpoints, written and read; deletes old ones
manifest.py: hashes of a checkpoint's arrays and files, and their checks
log.py: passes metrics to metrics.jsonl, trackers and the terminal, and raises alarms
metrics_log.py: names of metrics; metrics.jsonl and its digests, by which a changed line is found
console.py: the live view, or lines, of a run in the terminal
trackers.py: TensorBoard, W&B, Trackio, MLflow, and callbacks
terminal.py: text that is safe to print, errors of one line, output streams that may close
run_texts.py: start-up lines, result lines and the model card
object_store.py: objects in gs:// and s3:// stores
folder_copies.py: copies of a run's folder in an object store
settings/: recipes, `name=value`, options of other tools
"""
