"""From random weights to the checkpoint in the box; `python -m finegrain_ops.tiny_llava.training`."""
