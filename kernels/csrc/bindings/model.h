// A model that Python has packed, and its step: checks what Python hands over before any address
// is used, sorts rows by layer, calls the level's kernel.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "core/threads.h"
#include "core/workspace.h"
#include "levels.h"

namespace elastic_moe {

// Why a step was refused; the messages are in elastic_moe_kernels/step/checks.py.
enum StepRefusal {
    kStepFine = 0,
    kBadToken,       // (row, token id)
    kBadPosition,    // (row, position)
    kBadSequence,    // (row, sequence)
    kSplitSequence,  // (row, sequence): its rows are not one run of consecutive positions
    kBadRowSubnet,   // (row, sub-network)
    kMixedDepth,     // (row, sub-network): other layers run than for the row before
    kBadBlock,       // (sequence, block id), in layer `detail`
    kBadLogitsRow,   // (index, row)
    kBusy,
    kBadShapes,  // the arrays do not fit together; Python names the one
    kNotSingle,  // (row, sequence): a batch that advances has one row of each sequence
    kBadCount,   // (tokens given, rows)
};

typedef Array<const int32_t, 1> IntArray;
typedef Array<const int32_t, 3> IntTables;

// The sub-networks that rows may name: columns (S, L) and (S, L, E). The arrays are kept, and must
// not be written to during a step.
struct SubnetColumns {
    Array<const bool, 2> active;
    Array<const int32_t, 2> top_k, min_experts;
    Array<const float, 2> threshold;
    Array<const int32_t, 2> channels;
    Array<const bool, 3> pool;

    int64_t count() const { return static_cast<int64_t>(pool.shape(0)); }
    const uint8_t* active_bytes() const { return reinterpret_cast<const uint8_t*>(active.data()); }
};

// Cosines and sines of the rotary angles, (positions, d/2).
struct Angles {
    Array<const float, 2> cos, sin;
};

// A batch: what `Model.prepare` was given, which is kept, and the arrays of the last step, which
// the caller keeps.
struct StepInputs {
    std::shared_ptr<const SubnetColumns> table;
    std::shared_ptr<const Angles> angles;
    Array<uint8_t, 2> blocks;
    int threads = 1;

    Array<float, 2> logits;             // (n, V), or none: only the most likely tokens are wanted
    Array<const bool, 1> state_layers;  // (L + 1,), or none
    Array<float, 3> states;             // (copies, T, D)
    Array<int32_t, 3> trace_ids;        // (L, T, slots), or none

    int rows = 0, sequence_count = 0, table_blocks = 0, logits_count = 0;
    const int32_t *token_ids = nullptr, *positions = nullptr;
    const int32_t *sequences = nullptr, *subnets = nullptr;  // (T,)
    const int32_t* block_tables = nullptr;                   // (sequences, L, table_blocks)
    const int32_t* logits_rows = nullptr;

    std::vector<int32_t> own_tokens, own_positions;  // of a batch that advanced

    int64_t subnet_count() const { return table->count(); }
    int64_t kv_blocks() const { return static_cast<int64_t>(blocks.shape(0)); }
    int64_t angle_positions() const { return static_cast<int64_t>(angles->cos.shape(0)); }
};

// Sizes and habits, under the names of `ModelDims` in Python.
struct ModelSpec {
    bool bf16;
    int vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, num_experts;
    int expert_hidden;
    float rms_norm_eps;
    std::string qk_norm;  // "none", "head" or "all"
    std::string rope;     // "half" or "interleaved"
    bool renormalize;
    float routing_epsilon;
};

// One layer, packed; an array that is not valid is none.
struct LayerArrays {
    Floats attention_norm, q_norm, k_norm;
    Bytes qkv, out;
    Floats mlp_norm;
    Bytes router;
    Floats correction_bias;
    Bytes experts, everyone;
    int everyone_channels;
};

class NativeModel {
  public:
    NativeModel(const Kernels* kernels, const ModelSpec& spec);
    ~NativeModel();
    NativeModel(const NativeModel&) = delete;
    NativeModel& operator=(const NativeModel&) = delete;

    // Weights are kept, not copied.
    void set_layer(int index, LayerArrays arrays);
    void set_ends(const Numbers<2>& embeddings, const Floats& final_norm, const Bytes& head);

    // A batch that is to be run.
    StepInputs prepare(std::shared_ptr<const SubnetColumns> table,
                       std::shared_ptr<const Angles> angles, const Array<uint8_t, 2>& blocks,
                       int threads) const;

    // (refusal, where, value, detail), the most likely tokens, (token, expert) pairs of each
    // sequence, the counters in the order of `Counters`.
    typedef std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> CounterTuple;
    typedef std::tuple<int, int64_t, int64_t, int64_t, std::vector<int32_t>, std::vector<int64_t>,
                       CounterTuple>
        Answer;

    // Run a batch; its arrays must stay until its last step.
    Answer step(StepInputs& in, const IntArray& token_ids, const IntArray& positions,
                const IntArray& sequences, const IntArray& subnets, const IntTables& block_tables,
                const IntArray& logits_rows);

    // Run the next token of every sequence of a batch that `step` ran with one token of each. The
    // block tables are read again; refused, the batch stays where it was.
    Answer advance(StepInputs& in, const std::vector<int32_t>& token_ids);

  private:
    struct Found {
        int refusal = kStepFine;
        int64_t where = 0, value = 0, detail = 0;
    };
    template <class Prepare>
    Answer run(StepInputs& in, Prepare prepare);
    Found check(const StepInputs& in) const;
    void sort_rows(const StepInputs& in);
    bool outputs_fit(const StepInputs& in) const;
    void reserve(const StepInputs& in, StepArgs& args);

    const Kernels* kernels_;
    int expert_hidden_;
    ModelWeights weights_{};
    std::vector<LayerWeights> layer_;
    std::vector<LayerArrays> layer_arrays_;
    Numbers<2> embeddings_;
    Floats final_norm_;
    Bytes head_;
    int64_t most_channels_ = 0;
    Workspace workspace_;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;

    // Of the current step.
    std::vector<LayerRows> layers_;
    std::vector<std::vector<int32_t>> row_lists_, subnet_lists_;
    std::vector<int32_t> used_subnets_;  // each once
    std::vector<Span> spans_;
    std::vector<const int32_t*> blocks_;
    int most_slots_ = 0;
};

}  // namespace elastic_moe
