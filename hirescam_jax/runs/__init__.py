"""A run's folder: run.json, checkpoints, log.

run.py           what a run is, and `load_run`; read this first
config_files.py  configs as Python files and as JSON
setup.py         what a config names, opened: data, layout
checkpoints.py   Orbax checkpoints, written;  integrity.py  read and checked
log.py           metrics.jsonl and TensorBoard
"""
