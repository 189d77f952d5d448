"""The one list of operators. Apart from the package's ``__init__``, because schedules import the
definitions beside it, and operators import the schedules.
"""

from .linear_a8w8_quant import NPU_QUANT_MATMUL
from .npu_trans_quant_param import NPU_TRANS_QUANT_PARAM
from .nsa_compress_attention import NSA_COMPRESS_ATTENTION
from .op import Op
from .qordered_longformer_attention import QORDERED_LONGFORMER_ATTENTION
from .qordered_matmul import QORDERED_MATMUL
from .speed_fusion_attention import SPEED_FUSION_ATTENTION

OPS: tuple[Op, ...] = (
    QORDERED_MATMUL,
    NPU_QUANT_MATMUL,
    NPU_TRANS_QUANT_PARAM,
    QORDERED_LONGFORMER_ATTENTION,
    NSA_COMPRESS_ATTENTION,
    SPEED_FUSION_ATTENTION,
)
