"""Destinations of a run's metrics, one file per tracker. To add one, write a file here with `open_tracker`
and run `trackers=its_name`.

tracker.py: the type of a tracker
jsonl.py, console.py, tensorboard.py, wandb.py, trackio.py, mlflow.py: a tracker each
"""
