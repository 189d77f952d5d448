"""Tensors of real text for the single operators: what the encoder's first layer computes with."""

import numpy as np

from . import files, text
from .original import Original

ATTENTION = "encoder.layer.0.attention.self"
ROLES = ("query", "key", "value")
HEADS, HEAD_SIZE = 12, 32


def token_ids(length: int) -> np.ndarray:
    """The first `length` <= 512 tokens of the text, int64 (length,)."""
    return files.tokenize([text.whole()], max_tokens=length)["input_ids"][0, :length]


def hidden(length: int) -> np.ndarray:
    """Activations of these tokens, float32 (length, 384)."""
    ids = token_ids(length)[None]
    return Original(files.weights(), files.config()).embeddings(ids, np.zeros_like(ids))[0]


def query_key_value(length: int) -> list[np.ndarray]:
    """The three projections, float32 (length, 384) each."""
    x, w = hidden(length), files.weights()
    return [x @ w[f"{ATTENTION}.{r}.weight"].T + w[f"{ATTENTION}.{r}.bias"] for r in ROLES]


def words(ids: np.ndarray) -> str:
    """The text of some tokens."""
    return files.tokenizer().decode(ids.tolist())
