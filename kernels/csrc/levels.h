// The contract between the Python binding and the kernels, which are compiled once per
// instruction-set level. Functions here and in the kernels are static, and templates
// of the standard library are not used: of an inline function or a template instance the linker
// keeps one copy, and that could be the one compiled for a level that this machine lacks.
#pragma once

#include <cstdint>

#include "training.h"

namespace elastic_moe {

// Rows live on the stack of the thread that routes them; this bounds them.
constexpr int kMaxExperts = 4096;

// Shapes: T rows (tokens), E experts, S sub-networks, K output slots. Strides count elements.
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

// A packed matrix: [ceil(outputs/16)] panels, see values.h.
struct Matrix {
    const void* data;
    int outputs;
    int inputs;
};

// Packed SwiGLU experts of one size, one after the other, see experts.h.
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

// Which rows run which experts; made by experts.h in room that the caller has.
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

// Keys and values: blocks of 16 positions of one layer. A block holds, for each key/value head,
// keys as a panel (position = output, channel = input), then values as [16][d rounded up to 16].
constexpr int kBlockPositions = 16;

struct KVPool {
    void* data;
    int64_t block_values;  // numbers per block
    int kv_heads;
    int head_dim;
};

// A run of consecutive positions of one sequence: `rows` rows from `row` on, the first of them at
// `position`; blocks[i] holds positions 16i..16i+15.
struct Span {
    int row, rows, position;
    const int32_t* blocks;
};

struct AttentionArgs {
    KVPool kv;
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

struct ExpertsArgs {
    Ffn ffn;
    ExpertPlan plan;
    const void* inputs;  // (rows, input_stride)
    int64_t input_stride;
    int rows, slots;
    const int32_t* topk_ids;    // (rows, slots)
    const float* topk_weights;  // (rows, slots)
    const int32_t* channels;    // (rows,)
    float* sums;                // (threads, rows * 64)
    float* out;                 // (rows, D), added to
    int64_t weight_bytes, flops;  // counted
    int threads;
    bool bf16;
};

enum class QKNorm { kNone = 0, kHead = 1, kAll = 2 };

struct LayerWeights {
    const float* attention_norm;   // (D,)
    const float* q_norm;           // (d,) or (heads * d,), null without
    const float* k_norm;           // (d,) or (kv_heads * d,), null without
    Matrix qkv;                    // D -> (heads + 2 kv_heads) * d
    Matrix out;                    // heads * d -> D
    const float* mlp_norm;         // (D,)
    Matrix router;                 // float32, D -> E; no outputs in a dense layer
    const float* correction_bias;  // (E,) or null
    Ffn experts;                   // none in a dense layer
    Ffn everyone;                  // what every row runs: shared experts or the dense MLP, or none
};

struct ModelWeights {
    bool bf16;  // else float32
    int hidden, heads, kv_heads, head_dim, experts, vocab, layers;
    float eps;  // of all norms
    QKNorm qk_norm;
    bool interleaved;  // how channels pair up in the rotation
    bool renormalize;
    float routing_epsilon;
    const LayerWeights* layer;
    const float* final_norm;  // (D,)
    Matrix head;              // D -> vocab
    const void* embeddings;   // (vocab, D) rows as they are
};

// What a step did.
struct Counters {
    int64_t weight_bytes;  // of matrices and gains, each once
    int64_t kv_bytes;      // of keys and values read by attention
    int64_t flops;         // matrices at each row's own width, attention, norms
    int64_t experts_run;   // (row, expert) pairs
    int64_t rows_routed;   // (row, layer) pairs
    int64_t finite;        // 1 if every logit is a number, else 0
};

// The rows that run one layer.
struct LayerRows {
    int rows;
    const int32_t* row;      // which of the step's rows, ascending
    const int32_t* subnets;  // of each
    const Span* spans;       // in numbers of this list
    int span_count;
    int slots;  // the largest k
};

// Up to this many numbers of a layer's rows, every thread norms them for itself, which takes less
// than waiting for another.
constexpr int64_t kFewNumbers = 2048;

// One step over `rows` tokens; T is all rows, n those of a layer.
struct StepArgs {
    const ModelWeights* model;
    int rows;
    const int32_t* token_ids;  // (T,)
    const int32_t* positions;  // (T,)
    const int32_t* sequences;  // (T,)
    const LayerRows* layers;
    const int32_t* const* blocks;  // [sequence * L + layer]
    KVPool kv;
    const float *cos, *sin;  // (positions, d/2)

    // The table of sub-networks, (S, L) and (S, L, E).
    const int32_t *top_k, *min_experts, *channels;
    const float* threshold;
    const uint8_t* pool;
    int64_t subnets;

    const int32_t* logits_rows;
    int logits_count;
    float* logits;               // (logits_count, vocab)
    int32_t* best_ids;           // (logits_count,) zeros: the most likely token, the first among
                                 // equals, or -1 if a logit is not a number
    int64_t* sequence_experts;   // (sequences,) zeros: (token, expert) pairs that ran in all layers
    const uint8_t* state_layers;  // (L + 1,) whether to copy the stream after that many layers
    float* states;                // (copies, T, D)
    int32_t* trace_ids;           // (L, T, trace_slots) or null: what ran, -1 elsewhere
    int trace_slots;

    // Room; strides in numbers.
    float* stream;      // (T, D)
    float* normed;      // (T, D)
    void* inputs;       // (T, input_stride)
    int64_t input_stride;
    void* own_inputs;   // (threads, own_rows, input_stride)
    int own_rows;       // as many as have kFewNumbers
    float* qkv;         // (T, (heads + 2 kv_heads) * d)
    void* queries;      // (T, head_stride)
    void* attended;     // (T, head_stride)
    int64_t head_stride;
    float* router_logits;   // (T, E)
    int32_t* topk_ids;      // (T, K)
    float* topk_weights;    // (T, K)
    int32_t* row_channels;  // (T,)
    ExpertPlan plan;
    float* sums;  // (threads, T * 64)

    Counters counters;
    int threads;
};

// What one level offers.
struct Kernels {
    const char* level;
    int vector_floats;  // floats per vector register of this level
    bool openmp;
    void (*route)(const RouteArgs&);
    void (*linear)(const LinearArgs&);
    void (*experts)(ExpertsArgs&);
    void (*attention)(const AttentionArgs&);
    void (*rms_norm)(const float* x, const float* gain, int64_t rows, int n, float eps, float* out,
                     int threads);
    void (*step)(StepArgs&);
    int32_t (*probe)(const char* data, int64_t bytes, int threads);

    // Training. The sizes are numbers of floats: scratch of one thread, packed weights.
    int64_t (*attention_scratch)(const AttentionTraining&);
    int64_t (*attention_weights)(const AttentionTraining&);
    void (*attention_forward)(AttentionTraining&);
    void (*attention_backward)(AttentionTraining&);
    int64_t (*expert_scratch)(const ExpertsTraining&);
    int64_t (*expert_weights)(const ExpertsTraining&);
    void (*experts_forward)(ExpertsTraining&);
    void (*experts_backward)(ExpertsTraining&);
    int head_parts;
    int64_t (*head_scratch)(const HeadLossArgs&);
    int64_t (*head_weights)(const HeadLossArgs&);
    void (*head_loss)(HeadLossArgs&);
    int64_t (*muon_scratch)(const MuonArgs&);
    void (*muon)(MuonArgs&);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace elastic_moe
