"""How large the inputs of each linear layer get on real text: what smoothing int8 needs to know."""

import numpy as np

from . import files, text
from .original import Original


class _Observed(Original):
    """Remembers the largest magnitude of each input channel, by layer name."""

    def __init__(self, weights, config):
        super().__init__(weights, config)
        self.largest: dict[str, np.ndarray] = {}

    def linear(self, x, name):
        here = np.abs(x).max(axis=(0, 1))
        self.largest[name] = np.maximum(self.largest.get(name, 0), here)
        return super().linear(x, name)


def largest_inputs(weights: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """Layer name -> (in,) largest magnitude of each input channel over the text."""
    model = _Observed(weights, config)
    for passage in text.passages():
        model.embed(files.tokenize([passage]))
    return model.largest
