"""`hirescam prepare`: raw volumes -> a store, interrupted and continued at will.

prepare.py  the work, volume by volume; read this first
workers.py  the processes that do it
"""
