"""Tensors of real text for the single operators: what the encoder's first layer computes with.

The text is the opening of Lewis Carroll's "Alice's Adventures in Wonderland" (1865).
"""

from pathlib import Path

import numpy as np

from . import files, original

TEXT = Path(__file__).parent.parent / "text" / "alice.txt"
ATTENTION = "encoder.layer.0.attention.self"
ROLES = ("query", "key", "value")
HEADS, HEAD_SIZE = 12, 32


def token_ids(length: int) -> np.ndarray:
    """The first `length` <= 512 tokens of the text, int64 (length,)."""
    return files.tokenize([TEXT.read_text()], max_tokens=length)["input_ids"][0, :length]


def hidden(length: int) -> np.ndarray:
    """Activations of these tokens, float32 (length, 384)."""
    ids = token_ids(length)[None]
    tokens = {"input_ids": ids, "token_type_ids": np.zeros_like(ids)}
    return original.embeddings(files.weights(), files.config(), tokens)[0]


def query_key_value(length: int) -> list[np.ndarray]:
    """The three projections, float32 (length, 384) each."""
    x, w = hidden(length), files.weights()
    return [x @ w[f"{ATTENTION}.{r}.weight"].T + w[f"{ATTENTION}.{r}.bias"] for r in ROLES]


def words(ids: np.ndarray) -> str:
    """The text of some tokens."""
    return files.tokenizer().decode(ids.tolist())
