"""What the methods do to answers, for better or worse: the small model of finegrain_ops.tiny_llava, asked about scenes
that it was not trained on. `python -m bench.quality` (make eval); docs/tiny_llava.md tells what is measured.
"""
