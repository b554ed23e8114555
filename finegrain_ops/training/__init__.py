"""Training data of DualFocus and TinyGroundingGPT for the Trainer of transformers.

annotations/ reads the published data sets, filters.py drops what the papers drop, dualfocus.py and tinygroundinggpt.py
make samples and batches of what is left.
"""
