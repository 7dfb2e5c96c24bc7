"""The `hirescam` command: it reads options and starts things, nothing else.

main.py      the commands and how each ends; read this first
training.py  demo, train, convert
results.py   evaluate, explain, localize, table, compare, voc
data.py      phantom, prepare, inspect, lesions
options.py   what they share
outline.py   the fields of a config for a help text, without importing JAX
"""
