"""Procedural chest CTs: a function of (seed, split, index).

phantom.py   a case and the population; read this first
anatomy.py, chest.py, canvas.py   the body and how it is drawn
findings.py  the twelve findings
marks.py     what goes together with findings in training, outside of the organs
export.py    phantoms as NIfTI files
"""

from hirescam_jax.data.phantom.phantom import Phantom, PhantomCase, PhantomConfig

__all__ = ["Phantom", "PhantomCase", "PhantomConfig"]
