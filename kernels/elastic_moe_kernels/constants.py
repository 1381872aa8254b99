"""Numbers that the C++ kernels and their Python face share.

They are defined once on each side, here and in csrc/core/constants.h; `native` compares them when
it loads the extension. Without an extension these serve the reference and the sizes of weights.
"""

from __future__ import annotations

BLOCK_POSITIONS = 16  # of one layer in a block of keys and values
PANEL = 16  # outputs of a matrix that are packed side by side
STEP_BYTES = 64  # of a panel: 2 bfloat16 or 1 float32 for each of its outputs
VECTOR_VALUES = 32  # rows of matrix inputs are padded to a multiple: whole vectors of any dtype
MAX_EXPERTS = 4096
MAX_HEAD_DIM = 512
MAX_HEADS_PER_GROUP = 64  # query heads per key/value head
TRAINING_MULTIPLE = 16  # of the sizes that the training kernels take
SAMPLING_ROW_BYTES = 80  # of `ops.sample.SAMPLING_ROW`
LOGIT_CHANGE_BYTES = 32  # of `ops.sample.LOGIT_CHANGE`
