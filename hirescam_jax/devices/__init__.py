"""Devices and processes.

mesh.py        inside a compiled step: what is split, sums over devices; read this first
layout.py      outside of it: how batches lie on a mesh, what each process loads
processes.py   several processes: start, agree, end
rendezvous.py  how they find each other
preemption.py  signals
"""
