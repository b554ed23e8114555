"""The backends of `crop_resize`, one module each; `finegrain_ops.backends` decides which one runs.

interface.py   what a backend is given and what it must offer
sampling.py    which pixels weigh how much in an output pixel: the definition that every backend follows
"""
