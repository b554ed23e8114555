"""A small LLaVA that was trained on pictures drawn here, with its weights: what the demo asks, and what shows whether
the methods help. docs/tiny_llava.md tells all of it.

scenes, drawing   pictures of cards, from seeds
questions         what can be asked about them
held_out          questions about scenes of the splits that are not trained on
tokenizer, model  the words, and the model without weights
checkpoint        with weights: `checkpoint.load()`
training          from nothing to the checkpoint

Needs the packages of `pip install finegrain-ops[demo]`.
"""
