// What one step of a whole model works on.
#pragma once

#include "ops/args.h"

namespace elastic_moe {

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
    AttentionShares attention;
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
    float* logits;              // (logits_count, vocab)
    int32_t* best_ids;          // (logits_count,) zeros: the most likely token, the first among
                                // equals, or -1 if a logit is not a number
    int64_t* sequence_experts;  // (sequences,) zeros: (token, expert) pairs that ran in all layers
    const uint8_t* state_layers;  // (L + 1,) whether to copy the stream after that many layers
    float* states;                // (copies, T, D)
    int32_t* trace_ids;           // (L, T, trace_slots) or null: what ran, -1 elsewhere
    int trace_slots;

    // Workspace; strides in numbers.
    float* stream;  // (T, D)
    float* normed;  // (T, D)
    void* inputs;   // (T, input_stride)
    int64_t input_stride;
    void* own_inputs;  // (threads, own_rows, input_stride)
    int own_rows;      // as many as have kFewNumbers
    float* qkv;        // (T, (heads + 2 kv_heads) * d)
    void* queries;     // (T, head_stride)
    void* attended;    // (T, head_stride)
    int64_t head_stride;
    float* partials;        // of AttentionArgs, as much as any layer needs
    int32_t* runs_done;     // the same
    float* router_logits;   // (T, E)
    int32_t* topk_ids;      // (T, K)
    float* topk_weights;    // (T, K)
    int32_t* row_channels;  // (T,)
    ExpertPlan plan;
    float* sums;  // (threads, T * kDownColumns)

    Counters counters;
    int threads;
};

}  // namespace elastic_moe
