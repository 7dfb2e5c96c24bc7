"""A store: prepared volumes and masks, compressed, in shards, with checksums.

store.py   writing and reading; read this first
codec.py   one example as bytes
shards.py  the ArrayRecord files
"""
