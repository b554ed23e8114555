"""DualFocus (arXiv 2402.14767): one answer from the whole image, one with a zoomed crop, and the surer of the two.

BOX_PROMPT and COMBINE_PROMPT are Q1 and Q2 of Sec. 3.2 as the authors' code words them.
"""

from __future__ import annotations

BOX_PROMPT = "Please provide the bounding box coordinate of the region this question asks: {question}"
COMBINE_PROMPT = "Please combine the information from these two images and answer this question: {question}"
