"""``mell-ray bench``: what this machine does with a model, measured."""
