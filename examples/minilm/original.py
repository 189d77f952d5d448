"""all-MiniLM-L6-v2 as it was published, in float32 NumPy: what the compiled encoder is judged by.

B sentences of S tokens, H = 384 channels in N = 12 heads of D = 32. Shares no code with the ONNX
model and none with opferry.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float32])


def embed(weights: dict[str, np.ndarray], config: dict, tokens: dict[str, np.ndarray]):
    """Unit vectors (B, H) of token ids (B, S)."""
    mask = tokens["attention_mask"]
    x = embeddings(weights, config, tokens)
    for layer in range(config["num_hidden_layers"]):
        x = _layer(x, mask, weights, f"encoder.layer.{layer}", config)
    count = mask[:, :, None].astype(np.float32)
    mean = (x * count).sum(axis=1) / count.sum(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def embeddings(w: dict[str, np.ndarray], config: dict, tokens: dict[str, np.ndarray]):
    """What the first layer sees, (B, S, H): word, position and token type, normalised."""
    x = (
        w["embeddings.word_embeddings.weight"][tokens["input_ids"]]
        + w["embeddings.position_embeddings.weight"][: tokens["input_ids"].shape[1]]
        + w["embeddings.token_type_embeddings.weight"][tokens["token_type_ids"]]
    )
    return _layer_norm(x, w, "embeddings.LayerNorm", config)


def _layer(x, mask, w, name, config):
    a = _attention(x, mask, w, f"{name}.attention.self", config["num_attention_heads"])
    a = _linear(a, w, f"{name}.attention.output.dense")
    x = _layer_norm(x + a, w, f"{name}.attention.output.LayerNorm", config)
    h = _gelu(_linear(x, w, f"{name}.intermediate.dense"))
    h = _linear(h, w, f"{name}.output.dense")
    return _layer_norm(x + h, w, f"{name}.output.LayerNorm", config)


def _attention(x, mask, w, name, heads):
    def split(role):  # (B, S, H) -> (B, N, S, D)
        y = _linear(x, w, f"{name}.{role}")
        return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    q, k, v = split("query"), split("key"), split("value")
    scores = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(q.shape[-1]))
    scores = np.where(mask[:, None, None, :] == 1, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = p / p.sum(axis=-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(x.shape)


def _linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _layer_norm(x, w, name, config):
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config["layer_norm_eps"])
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def _gelu(x):
    return x * 0.5 * (1 + _erf(x / np.float32(math.sqrt(2))))
