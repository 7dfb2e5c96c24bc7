"""A run, measured: predictions, maps against organs and lesions, checks of the maps.

evaluate.py  a run's evaluation.json; read this first
result.py    what is in it, as dataclasses
predict.py   a split's predictions and its maps' measures, on all devices
summary.py   both as figures with intervals; text.py prints them
checks.py    faithfulness and sanity
values.py    the values of each volume, of which tables make differences
resume.py    what an interrupted evaluation keeps
compare.py   maps of two runs;  localize.py  written maps against masks
tables/      tables of several runs
"""
