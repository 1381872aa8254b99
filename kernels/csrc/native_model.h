// A model that Python has packed, and its step: checks what Python hands over before any address
// is used, sorts rows by layer, calls the level's kernel.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "levels.h"
#include "room.h"

namespace elastic_moe {

// Why a step was refused; the messages are in step_checks.py.
enum StepRefusal {
    kStepFine = 0,
    kBadToken,      // (row, token id)
    kBadPosition,   // (row, position)
    kBadSequence,   // (row, sequence)
    kSplitSequence, // (row, sequence): its rows are not one run of consecutive positions
    kBadRowSubnet,  // (row, sub-network)
    kMixedDepth,    // (row, sub-network): other layers run than for the row before
    kBadBlock,      // (sequence, block id), in layer `detail`
    kBadLogitsRow,  // (index, row)
    kBusy,
    kBadShapes,     // the arrays do not fit together; Python says which
    kNotSingle,     // (row, sequence): a batch that advances has one row of each sequence
    kBadCount,      // (tokens given, rows)
};

// Row-major int32 in main memory; anything else is a TypeError, never a silent copy.
typedef nanobind::ndarray<const int32_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>
    IntArray;
typedef nanobind::ndarray<const int32_t, nanobind::ndim<3>, nanobind::c_contig, nanobind::device::cpu>
    IntTables;

// What a batch is. Python sets what its arrays do not say; `step` fills in the rest from them.
struct StepInputs {
    int rows;
    uintptr_t token_ids, positions, sequences, subnets;  // int32 (T,)
    int sequence_count, table_blocks;
    uintptr_t block_tables;  // int32 (sequences, L, table_blocks)
    uintptr_t kv;
    int64_t kv_blocks;
    uintptr_t cos, sin;
    int64_t angle_positions;
    uintptr_t active, top_k, min_experts, threshold, channels, pool;
    int64_t subnet_count;
    int logits_count;
    uintptr_t logits_rows;
    uintptr_t logits;  // 0: nobody wants them
    uintptr_t state_layers, states;
    uintptr_t trace_ids;
    int trace_slots;
    int threads;

    std::vector<int32_t> own_tokens, own_positions;  // of a batch that advanced
};

class NativeModel {
  public:
    NativeModel(const Kernels* kernels, bool bf16, int hidden, int heads, int kv_heads,
                int head_dim, int experts, int vocab, int layers, float eps, int qk_norm,
                bool interleaved, bool renormalize, float routing_epsilon);

    void set_layer(int index, uintptr_t attention_norm, uintptr_t q_norm, uintptr_t k_norm,
                   uintptr_t qkv, uintptr_t out, uintptr_t mlp_norm, uintptr_t router,
                   uintptr_t correction_bias, uintptr_t experts, int channels, uintptr_t everyone,
                   int everyone_channels);
    void set_ends(uintptr_t embeddings, uintptr_t final_norm, uintptr_t head);

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
    void take_room(const StepInputs& in, StepArgs& args);

    const Kernels* kernels_;
    ModelWeights weights_{};
    std::vector<LayerWeights> layer_;
    int64_t most_channels_ = 0;
    Room room_;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;

    // Of the current step.
    std::vector<LayerRows> layers_;
    std::vector<std::vector<int32_t>> row_lists_, subnet_lists_;
    std::vector<int32_t> used_subnets_;  // each once
    std::vector<Span> spans_;
    std::vector<const int32_t*> blocks_;
    int most_slots_ = 0;
};

void define_model(nanobind::module_& m, const Kernels* (*kernels)(int level));

}  // namespace elastic_moe
