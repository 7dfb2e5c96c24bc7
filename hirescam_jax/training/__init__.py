"""Training.

step.py     the train step, one compiled program: read this first
augment.py  flips and rotations in it
loop.py     the loop around it;  watch.py  where its time goes
costs.py    what a compiled step costs and exchanges
convert.py  PyTorch weights <-> runs
"""
