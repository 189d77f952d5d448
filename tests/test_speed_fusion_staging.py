"""SpeedFusionAttention on matrix tiles with many query rows a task, and more keys than are made
ready together (bfloat16, or a bias or a mask).
"""

import pytest
from hosts import on
from speed_fusion_cases import BF16, CAUSAL, F16, F32, build, judge, normal, qkv, random_mask, run

B, N1, S1, S2, D = 2, 2, 70, 1100, 40
ATTRS = {"head_num": N1, "input_layout": "BNSD", "scale": 0.2}
MODES = {
    "plain": {},
    "causal": {"sparse_mode": 3},
    "bias": {},
    "causal bias": {"sparse_mode": 3},
    "bias times scale": {"pse_type": 0},
    "mask": {"sparse_mode": 1},
    "masked bias": {"sparse_mode": 1},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_staged_tiles(dtype, mode):
    """An unknown batch leaves a task its largest number of rows; without the sum of a row its
    weights may be coarser.
    """
    feeds = qkv(B, N1, 1, S1, S2, D, dtype=dtype)
    symbolic = {name: {0: "B"} for name in feeds}
    if "bias" in mode:
        feeds["pse"] = normal(B, N1, S1, S2, dtype=dtype, seed=5)
        symbolic["pse"] = {0: "B"}
    if "causal" in mode:
        feeds["atten_mask"] = CAUSAL
    elif "mask" in mode:
        feeds["atten_mask"] = random_mask(S1, S2)
        feeds["atten_mask"][:32, 64:160] = True  # tiles without a pair for a group of rows
        feeds["atten_mask"][5] = True
    attrs = ATTRS | MODES[mode]
    outputs = ["attention_out"] if "bias" in mode else ["attention_out", "softmax_sum"]
    module = build(feeds, target=on("x86-amx"), symbolic=symbolic, outputs=outputs, **attrs)
    judge(run(module, feeds), feeds, attrs)
