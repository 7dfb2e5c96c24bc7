"""Explanations: arrays and functions in, maps out; nothing of the rest of the package.

cam.py           HiResCAM and Grad-CAM; read this first
family.py        their relatives, with a head and its features
inputs.py        gradients and occlusion of the whole model
explain.py       a model -> logits, maps, residual, verdict
methods.py       the registry of methods: a new one goes there
gradients.py     many labels' gradients through a head, in bounded memory
independence.py  whether a head mixes the examples of a batch
verdict.py       what a head guarantees
"""
