"""Everything is in pyproject.toml. This file is where the optional CUDA extension will be declared; without it the
install is pure Python.
"""

from setuptools import setup

setup()
