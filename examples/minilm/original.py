"""all-MiniLM-L6-v2 as it was published, in float32 NumPy: what the compiled encoder is judged by.

B sentences of S tokens, H = 384 channels in N = 12 heads of D = 32. Shares no code with the ONNX
model and none with opferry.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float32])


class Original:
    """`weights` are the published float32 tensors by name, `config` is the model's config.json."""

    def __init__(self, weights: dict[str, np.ndarray], config: dict):
        self.weights = weights
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.epsilon = config["layer_norm_eps"]

    def embed(self, tokens: dict[str, np.ndarray]) -> np.ndarray:
        """Unit vectors (B, H) of input_ids, attention_mask and token_type_ids (B, S)."""
        mask = tokens["attention_mask"]
        x = self.embeddings(tokens["input_ids"], tokens["token_type_ids"])
        for layer in range(self.layers):
            x = self._layer(x, mask, f"encoder.layer.{layer}")
        count = mask[:, :, None].astype(np.float32)
        mean = (x * count).sum(axis=1) / count.sum(axis=1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def embeddings(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """What the first layer sees, (B, S, H): word, position and token type, normalised."""
        w = self.weights
        x = (
            w["embeddings.word_embeddings.weight"][input_ids]
            + w["embeddings.position_embeddings.weight"][: input_ids.shape[1]]
            + w["embeddings.token_type_embeddings.weight"][token_type_ids]
        )
        return self._layer_norm(x, "embeddings.LayerNorm")

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _layer(self, x, mask, name):
        a = self._attention(x, mask, f"{name}.attention.self")
        a = self.linear(a, f"{name}.attention.output.dense")
        x = self._layer_norm(x + a, f"{name}.attention.output.LayerNorm")
        h = _gelu(self.linear(x, f"{name}.intermediate.dense"))
        h = self.linear(h, f"{name}.output.dense")
        return self._layer_norm(x + h, f"{name}.output.LayerNorm")

    def _attention(self, x, mask, name):
        def split(role):  # (B, S, H) -> (B, N, S, D)
            y = self.linear(x, f"{name}.{role}")
            return y.reshape(*y.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)

        q, k, v = split("query"), split("key"), split("value")
        scores = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(q.shape[-1]))
        scores = np.where(mask[:, None, None, :] == 1, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = p / p.sum(axis=-1, keepdims=True) @ v
        return out.transpose(0, 2, 1, 3).reshape(x.shape)

    def _layer_norm(self, x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return centred / deviation * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def _gelu(x):
    return x * 0.5 * (1 + _erf(x / np.float32(math.sqrt(2))))
