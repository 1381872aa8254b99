// Numbers that several files, and Python, must agree on. Python has those of `kShared` in
// elastic_moe_kernels/constants.py and compares them when it loads the extension.
#pragma once

#include <cstdint>

namespace elastic_moe {

// Packed matrices: outputs side by side, see core/values.h.
constexpr int kPanel = 16;
constexpr int kStepBytes = 64;                   // of a panel
constexpr int kUnitBytes = kStepBytes / kPanel;  // of one output: 2 bfloat16 or 1 float32
constexpr int kVectorValues = 32;                // rows of matrix inputs are padded to a multiple
static_assert(kUnitBytes == sizeof(float), "a step holds one float32 of each output");
static_assert(kVectorValues % kPanel == 0 && kVectorValues * sizeof(uint16_t) % kStepBytes == 0,
              "rows of matrix inputs are whole panels and whole vectors, in bfloat16 too");

// Keys and values: positions of one layer in a block, and blocks per softmax tile of attention.
constexpr int kBlockPositions = 16;
constexpr int kTileBlocks = 16;
constexpr int kTilePositions = kTileBlocks * kBlockPositions;
static_assert(kBlockPositions == kPanel, "the keys of a block are one panel");

// Outputs of an expert's down matrix in a piece of work, in panels and in columns.
constexpr int kDownPanels = 4;
constexpr int kDownColumns = kDownPanels * kPanel;

// What lives on the stack of a thread bounds these.
constexpr int kMaxExperts = 4096;
constexpr int kMaxHeadDim = 512;
constexpr int kMaxHeadsPerGroup = 64;  // query heads per key/value head

// Training: sizes are multiples of kTrainingMultiple; rows are worked on in blocks.
constexpr int kTrainingMultiple = 16;
constexpr int kTrainingBlockRows = 64;
static_assert(kTrainingMultiple % kPanel == 0, "training products take whole panels of columns");

// Sampling: weights whose sum is kept; bytes of what Python hands over.
constexpr int kSampleBlock = 512;
constexpr int kSamplingRowBytes = 80;
constexpr int kLogitChangeBytes = 32;

struct SharedConstant {
    const char* name;
    int value;
};

constexpr SharedConstant kShared[] = {
    {"PANEL", kPanel},
    {"STEP_BYTES", kStepBytes},
    {"VECTOR_VALUES", kVectorValues},
    {"BLOCK_POSITIONS", kBlockPositions},
    {"MAX_EXPERTS", kMaxExperts},
    {"MAX_HEAD_DIM", kMaxHeadDim},
    {"MAX_HEADS_PER_GROUP", kMaxHeadsPerGroup},
    {"TRAINING_MULTIPLE", kTrainingMultiple},
    {"SAMPLING_ROW_BYTES", kSamplingRowBytes},
    {"LOGIT_CHANGE_BYTES", kLogitChangeBytes},
};

static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Of one key/value head in a block: keys as a panel (position = output, channel = input), then
// values as rows of channels, padded to whole panels.
static constexpr int64_t kv_head_values(int head_dim) {
    return kBlockPositions * (head_dim + round_up(head_dim, kPanel));
}

}  // namespace elastic_moe
