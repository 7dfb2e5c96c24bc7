"""A run's maps as files: of NIfTI volumes, or of a whole store.

volumes.py  whichever of the two is given: read this first
files.py    NIfTI in, maps and pictures out;  store.py  a store's split
maps.py     the programs;  zarr.py, nifti.py  what they write
"""
