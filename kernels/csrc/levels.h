// The contract between the Python binding and the kernels, which are compiled once per
// instruction-set level. Functions here and in the kernels are static, and templates
// of the standard library are not used: of an inline function or a template instance the linker
// keeps one copy, and that could be the one compiled for a level that this machine lacks.
#pragma once

#include <cstdint>

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

// What one level offers.
struct Kernels {
    const char* level;
    int vector_floats;  // floats per vector register of this level
    bool openmp;
    void (*route)(const RouteArgs&);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace elastic_moe
