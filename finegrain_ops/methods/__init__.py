"""The methods that the operators were made for, end to end: CoF (cof.py), DualFocus (dualfocus.py).

They share: prompting.py (questions and images as inputs), generation.py (one generate, its answers and how sure the
model was of them), perplexity.py, grounding.py (from a box in text to a region of the image), results.py.
"""
