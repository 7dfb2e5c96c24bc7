"""`hirescam prepare`: raw volumes -> a store, interrupted and continued at will.

prepare.py  the work, volume by volume; read this first
plan.py     which study comes into which split and file
workers.py  the processes that do it
"""
