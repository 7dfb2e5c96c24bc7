"""Devices and processes.

mesh.py        inside a compiled step: what is split over which axis, sums over devices
layout.py      outside of it: how batches lie on a mesh, what each process loads
processes.py   several processes: start, agree, end
rendezvous.py  how they find each other
preemption.py  signals
"""
