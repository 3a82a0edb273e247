"""Results: models and adapters as folders, GGUF files and on the hub.

calibrate.py: which rows calibrate a base, and its codes; second moments of layers' inputs
export.py: write a model as a Hugging Face folder or a GGUF file
push.py: which files of a run are pushed to the hub, and with which card
finished_run.py: results of a finished run: last and best weights, model card, summary, a sweep's table
"""
