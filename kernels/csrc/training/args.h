// What the training kernels work on: half a layer each, forward and backward. All numbers are
// float32; T rows are sequences of `length` tokens, one after the other.
#pragma once

#include <cstdint>

namespace elastic_moe {

// x + attention(norm(x)), causal within each sequence.
struct AttentionTraining {
    int64_t rows;
    int length, hidden, heads, kv_heads, head_dim;
    bool interleaved;
    float eps;
    int threads;

    const float* x;                // (T, D)
    const float* norm;             // (D,)
    const float *q_norm, *k_norm;  // (d,), or null without
    const float *q, *k, *v;        // (heads * d, D), (kv_heads * d, D) twice
    const float* o;                // (D, heads * d)
    const float *cos, *sin;        // (length, d/2)

    // Written forward, read backward.
    float* norm_scale;  // (T,)
    float* qkv;         // (T, (heads + 2 kv_heads) * d) before norms and rotation
    float* head_scale;  // (T, heads + kv_heads)
    float* rotated;     // (T, (heads + kv_heads) * d)
    float* attended;    // (T, heads * d)
    float* log_sums;    // (T, heads)
    float* out;         // (T, D)

    const float* grad_out;  // (T, D)
    float* grad_x;          // (T, D)
    float *grad_norm, *grad_q_norm, *grad_k_norm, *grad_q, *grad_k, *grad_v, *grad_o;

    // Workspace.
    float* weights;     // packed
    float* normed;      // (T, D)
    float* grad_qkv;    // (T, (heads + 2 kv_heads) * d)
    float* grad_heads;  // (T, heads * d)
    float* partial;     // (blocks, D + 2 d)
    float* scratch;     // (threads, scratch_size)
    int64_t scratch_size;
};

// x + experts(norm(x)) of one sub-network, and how evenly they share the work.
struct ExpertsTraining {
    int64_t rows;
    int hidden, experts, channels, width, slots;  // width: the channels that run
    bool renormalize;
    float eps, epsilon;
    int threads;

    const float* x;                 // (T, D)
    const float* norm;              // (D,)
    const float* router;            // (E, D)
    const float *gate, *up, *down;  // (E, F, D) twice, (E, D, F)
    const float* correction_bias;   // (E,) or null
    int32_t top_k, min_experts;
    float threshold;
    const uint8_t* pool;  // (E,)

    // Written forward, read backward.
    float* norm_scale;     // (T,)
    float* normed;         // (T, D)
    float* router_logits;  // (T, E)
    int32_t* topk_ids;     // (T, slots)
    float* topk_weights;   // (T, slots)
    int32_t* place;        // (T, slots) where each choice stands among those of all experts
    int32_t* token;        // (T * slots,) of each choice
    float* weight;         // (T * slots,) of each choice
    int32_t* ends;         // (E,) one past the last choice of each expert
    float* gate_up;        // (T * slots, 2 * padded width)
    float* out;            // (T, D)
    float* balance;        // P sum_e f_e p_e

    const float* grad_out;  // (T, D)
    float grad_balance;
    float* grad_x;  // (T, D)
    float *grad_norm, *grad_router, *grad_gate, *grad_up, *grad_down;

    // Workspace.
    float* outputs;  // (T * slots, D)
    float* weights;  // (threads, packed weights of one expert)
    int64_t weights_size;
    float* grad_weight;  // (T * slots,)
    float* grad_logits;  // (T, E)
    float* partial;      // (blocks, D + E)
    float* scratch;      // (threads, scratch_size)
    int64_t scratch_size;
};

// Mean cross-entropy of softmax(x W^T), and its gradients.
struct HeadLossArgs {
    int64_t rows;
    int hidden, vocab, threads;
    const float* x;          // (rows, D)
    const float* weight;     // (V, D)
    const int64_t* targets;  // (rows,) in [0, V)
    float* loss;             // one number
    float* grad_x;           // (rows, D)
    float* grad_weight;      // (V, D)

    // Workspace.
    float* weights;  // packed
    float* partial;  // (parts, V, D)
    float* scratch;  // (threads, scratch_size)
    int64_t scratch_size;
};

// Parameters of one shape: `matrices` of (rows, columns), one after the other.
struct MuonMatrices {
    float *p, *momentum;
    const float* grad;
    int64_t matrices, rows, columns;
};

struct MuonArgs {
    const MuonMatrices* list;
    int count, steps, threads;
    float lr, beta, weight_decay;
    float* scratch;  // (threads, scratch_size)
    int64_t scratch_size;
};

}  // namespace elastic_moe
