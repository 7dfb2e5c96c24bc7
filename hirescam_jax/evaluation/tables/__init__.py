"""Tables of several runs.

runs.py         `hirescam table`; read this first
cells.py        a table's cells, and what may be compared
differences.py  what a run gains over another, in the same resamples
masks.py        the papers' layout of downsampling against dilation
"""
