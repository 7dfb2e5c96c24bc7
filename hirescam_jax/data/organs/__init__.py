"""Where the organs of a volume are.

sources.py           where masks come from, by name: a new source goes there; read this first
chest.py             lungs, heart and mediastinum found in the CT itself
mediastinum.py       what lies between the lungs
totalsegmentator.py  the classes of TotalSegmentator
label_maps.py        label maps and masks on another grid -> a volume's
feature_grid.py      masks of voxels -> masks of feature cells
"""
