// What single kernels work on. Shapes: T rows (tokens), E experts, S sub-networks, K output slots.
#pragma once

#include "core/constants.h"

namespace elastic_moe {

// Strides count elements.
struct RouteArgs {
    const float* router_logits;  // (T, E) contiguous
    const void* subnet_of_row;   // (T,) int32 or int64, each in [0, S)
    int subnet_index_bytes;      // 4 or 8
    int64_t rows;                // T
    int experts;                 // E in [1, kMaxExperts]
    int slots;                   // K, the largest k of the table

    const int32_t* top_k;  // (S,)
    int64_t top_k_stride;
    const int32_t* min_experts;  // (S,)
    int64_t min_experts_stride;
    const float* threshold;  // (S,)
    int64_t threshold_stride;
    const uint8_t* pool;  // (S, E), a row of bytes per sub-network, non-zero inside the pool
    int64_t pool_stride;
    int64_t subnets;  // S

    const float* correction_bias;  // (E,) or null
    bool renormalize;
    float epsilon;

    int32_t* topk_ids;    // (T, K) out
    float* topk_weights;  // (T, K) out
    int threads;          // most threads to use
};

static inline int64_t subnet_of(const RouteArgs& args, int64_t row) {
    return args.subnet_index_bytes == 8 ? static_cast<const int64_t*>(args.subnet_of_row)[row]
                                        : static_cast<const int32_t*>(args.subnet_of_row)[row];
}

// A packed matrix: [ceil(outputs/kPanel)] panels, see core/values.h.
struct Matrix {
    const void* data;
    int outputs;
    int inputs;
};

// Packed SwiGLU experts of one size, one after the other, see ops/experts.h.
struct Ffn {
    const void* data;
    int experts;
    int hidden;    // D, inputs and outputs
    int channels;  // F
};

// One expert and the slots (a row's choice of it) begin..end-1, widest first.
struct ExpertJob {
    const void* gate_up;
    const void* down;
    int32_t begin, end;
    const Ffn* ffn;
};

// Which rows run which experts; made by ops/experts.h in memory of the caller.
struct ExpertPlan {
    ExpertJob* jobs;
    int jobs_used;
    int32_t slots_used;
    int32_t* row;       // of each slot
    float* weight;      // of each slot
    int32_t* channels;  // that each slot runs
    int32_t* count;     // (E,) scratch
    int32_t* tally;     // (F + 2,) scratch
    int32_t* order;     // (rows,) scratch
    void* hidden;       // (slots, hidden_stride)
    int64_t hidden_stride;
};

// Blocks of keys and values of one layer, see kv_head_values.
struct KVPool {
    void* data;
    int kv_heads;
    int head_dim;
};

// A run of consecutive positions of one sequence: `rows` rows from `row` on, the first of them at
// `position`; blocks[i] holds positions 16i..16i+15.
struct Span {
    int row, rows, position;
    const int32_t* blocks;
};

// How attention is shared out among threads; results do not depend on it.
struct AttentionShares {
    int rows;           // (token, query head) pairs per piece of work
    int runs;           // pieces that the tiles of a single token's head are cut into
    int partial_tiles;  // tiles of the longest such token, if runs > 1
    int partials;       // (token, key/value head) pairs that are cut
};

struct AttentionArgs {
    KVPool kv;
    AttentionShares shares;
    float* partials;     // (shares.partials, partial_tiles, group, 2 + channels), if runs > 1
    int32_t* runs_done;  // (shares.partials,) zeros, and zeros again afterwards
    int heads;
    float scale;
    const void* queries;  // (rows, query_stride) rotated, as matrix inputs
    int64_t query_stride;
    const Span* spans;
    int span_count;
    void* out;  // (rows, out_stride), as matrix inputs
    int64_t out_stride;
    int threads;
    bool bf16;
};

struct LinearArgs {
    Matrix matrix;
    const void* inputs;  // (rows, input_stride)
    int64_t input_stride;
    int rows;
    float* out;  // (rows, outputs)
    int threads;
    bool bf16;
};

// Arrays of rows x vocab, and of rows.
struct DivergenceArgs {
    const float* logits;
    const float* reference;
    const int64_t* targets;
    int64_t rows;
    int vocab;
    float* losses;
    double* divergences;
    bool* agreed;
    int threads;
};

struct NormArgs {
    const float* x;     // (rows, columns)
    const float* gain;  // (columns,)
    int64_t rows;
    int columns;
    float eps;
    float* out;  // (rows, columns)
    int threads;
};

// How one row is sampled, as `elastic_moe_kernels.ops.sample_reference.SAMPLING_ROW`.
struct SamplingRow {
    double temperature, top_p, min_p;
    double repetition_penalty, frequency_penalty, presence_penalty;
    int64_t top_k;
    uint64_t seed, choice, position;
};
static_assert(sizeof(SamplingRow) == kSamplingRowBytes, "Python has it, too");

// What happens to the logit of one token of a row, as `LOGIT_CHANGE` there.
struct LogitChange {
    int64_t token, count, seen;
    double bias;
};
static_assert(sizeof(LogitChange) == kLogitChangeBytes, "Python has it, too");

// Memory to sample a row of V logits in.
struct SampleWork {
    float* weights;   // (V rounded up to kSampleBlock,)
    uint64_t* sums;   // of each block of weights
    float* logits;    // (V,) after changes, or null if no row has any
    float* largest;   // of each piece of a row
    uint64_t* above;  // one number
};

struct SampleArgs {
    const float* logits;         // (n, V)
    int vocab;                   // V
    int64_t count;               // R rows to sample
    const int32_t* logits_rows;  // (R,) in [0, n)
    const SamplingRow* rows;     // (R,)
    const LogitChange* changes;  // or null; row r has those from change_ends[r - 1] to before
    const int64_t* change_ends;  // change_ends[r]
    const uint32_t* masks;       // (M, mask_words) a bit for each token that may come, or null
    int64_t mask_words;
    const int32_t* mask_rows;  // (R,) in [-1, M), -1 for none; or null
    int32_t* token_ids;        // (R,) out
    const SampleWork* work;    // one for each thread
    int threads;
};

struct LogprobArgs {
    const float* logits;         // (n, V)
    int vocab;                   // V
    int64_t count;               // R
    const int32_t* logits_rows;  // (R,) in [0, n)
    const int32_t* token_ids;    // (R,) in [0, V)
    int top;                     // N in [0, V]
    double* logprobs;            // (R,) out
    int32_t* top_ids;            // (R, N) out
    double* top_logprobs;        // (R, N) out
    const SampleWork* work;      // one for each thread
    int threads;
};

struct ExpertsArgs {
    Ffn ffn;
    ExpertPlan plan;
    const void* inputs;  // (rows, input_stride)
    int64_t input_stride;
    int rows, slots;
    const int32_t* topk_ids;      // (rows, slots)
    const float* topk_weights;    // (rows, slots)
    const int32_t* channels;      // (rows,)
    float* sums;                  // (threads, rows * kDownColumns)
    float* out;                   // (rows, D), added to
    int64_t weight_bytes, flops;  // counted
    int threads;
    bool bf16;
};

}  // namespace elastic_moe
