"""all-MiniLM-L6-v2, quantised to int8, on real sentences: compile, check, compare, use.

    make demo          or, with the weights installed:  python examples/sentence_encoder.py

1. The model: six layers with the published weights as ONNX, its linear layers
   npu::NPUQuantMatmul, its attention mindspore::SpeedFusionAttention.
2. One compiled module, run on batches of several sizes and lengths.
3. Every node of it must agree with the same ONNX model in NumPy.
4. Every sentence must agree with the published float32 model: int8 costs it about 0.001 of cosine
   similarity, a sentence of one word up to 0.006.
5. The nearest sentences, which is what such embeddings are for.
"""

import sys
import time

import numpy as np
from minilm import calibration, files, quantised
from minilm.original import Original

import opferry

SENTENCES = [
    "The harbour was quiet after the storm.",
    "After the gale, the port lay still.",
    "She learned to play the violin at the age of six.",
    "He took up the cello when he was a small child.",
    "Water boils at a lower temperature on a mountain.",
    "Because the air is thinner at high altitude, a kettle comes to the boil before the water has "
    "reached one hundred degrees.",
    "The committee postponed the vote until Thursday.",
    "No decision was made; the ballot was moved to later in the week.",
    "My bicycle has a flat tyre.",
    "Bread needs flour, water, salt and yeast.",
    "To bake a loaf, mix flour with water, a little salt and some yeast, let the dough rise, and "
    "put it into a hot oven.",
    "I love you.",
]
WORST_COSINE = 0.99


def main(sentences: list[str] = SENTENCES) -> int:
    weights, config = files.weights(), files.config()
    largest = calibration.largest_inputs(weights, config)
    model = quantised.build(weights, config, largest)

    module = compile_with_times(model)
    print(module)

    # Short and long sentences in batches of their own, and all of them in one padded batch.
    batches = [sentences[:1], sentences[1:5], sentences]
    tokens = [files.tokenize(batch) for batch in batches]
    compiled = [module.run(batch)["embedding"] for batch in tokens]
    shapes = ", ".join(str(batch["input_ids"].shape) for batch in tokens)
    print(f"one module ran batches of (sentences, tokens) {shapes}")

    # A value at the border of two int8 steps may fall to either side when float sums are added in
    # another order, and later layers carry that on; each node still agrees on what it was given.
    report = opferry.validate(model, module, inputs=tokens[1])
    print(f"against the same ONNX model in NumPy, sentences 2 to 5:\n{report}\n")

    embeddings = compiled[-1]
    cosines = (embeddings * Original(weights, config).embed(tokens[-1])).sum(axis=1)
    print_table(sentences, embeddings, cosines)
    alone = (compiled[0][0] * embeddings[0]).sum()
    print(f"\nthe first sentence alone and in the padded batch: cosine {alone:.4f}")
    mean, worst = cosines.mean(), cosines.min()
    print(f"int8 against float32: cosine {mean:.4f} on average, {worst:.4f} at worst")

    if not report.ok or worst < WORST_COSINE:
        print(f"WRONG: allowed are nodes that agree with NumPy and cosines above {WORST_COSINE}")
        return 1
    return 0


def compile_with_times(model) -> opferry.Module:
    steps = []
    start = time.perf_counter()
    module = opferry.compile(model, progress=lambda step: steps.append((step, time.perf_counter())))
    end = time.perf_counter()
    ends = [began for _, began in steps[1:]] + [end]
    phases = [f"{step} {after - began:.1f} s" for (step, began), after in zip(steps, ends)]
    print(f"compiled in {end - start:.1f} s: {', '.join(phases)}")
    return module


def print_table(sentences: list[str], embeddings: np.ndarray, cosines: np.ndarray) -> None:
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -1)
    print(f"{'int8 : float32':14}  {'sentence':44}  nearest")
    for i, nearest in enumerate(similarity.argmax(axis=1)):
        print(
            f"{cosines[i]:14.4f}  {short(sentences[i]):44}  "
            f"{similarity[i, nearest]:.2f} {short(sentences[nearest])}"
        )


def short(text: str, width: int = 44) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
