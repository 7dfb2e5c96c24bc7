"""Synthetic lesions in real CTs, with their true masks.

lesions.py  one volume; read this first
shapes.py   the lesions
folder.py   a folder of CTs
"""
