// The two kinds of numbers that matrices hold, their inputs and the cache: bfloat16 and float32.
// Sums are float32 in both.
//
// Sixteen outputs make a panel. A packed matrix of N outputs and K inputs is [ceil(N/16)] panels
// of `steps` vectors of 64 bytes; one vector holds, for each of the 16 outputs, the next kDepth
// inputs' weights: pairs in bfloat16 (what vdpbf16ps multiplies), single ones in float32. Missing
// outputs and inputs are zeros.
#pragma once

#include "core/constants.h"
#include "core/simd.h"

namespace {

using elastic_moe::kPanel;
using elastic_moe::kStepBytes;

constexpr int kParts = kPanel / kLanes;  // vectors per panel
static_assert(kPanel % kLanes == 0, "a panel is whole vectors");
static_assert(elastic_moe::kVectorValues % kLanes == 0, "so are rows of matrix inputs");
static_assert(elastic_moe::kTrainingMultiple % kLanes == 0, "so are rows of training");

// Sixteen sums, in as many registers as they take.
struct Panel {
    VFloat part[kParts];
};

// sums += w . x over the first N inputs of a step, which are float32.
template <int N, class Wide>
static inline __attribute__((always_inline)) void add_inputs(Panel& sums, const Wide& w,
                                                             const float* x) {
    for (int n = 0; n < N; ++n) {
        const VFloat input = broadcast(x[n]);
        for (int i = 0; i < kParts; ++i) sums.part[i] = fma(w.part[n][i], input, sums.part[i]);
    }
}

struct Bf16 {
    typedef uint16_t Value;
    static constexpr int kDepth = 2;

    // The weights of a step as float32, by input.
    struct Wide {
        VFloat part[kDepth][kParts];
    };

#if defined(__AVX512BF16__)
    struct Weights {
        __m512bh pairs;
    };
#else
    typedef Wide Weights;
#endif

    static inline __attribute__((always_inline)) Wide wide(const Value* p) {
        Wide w;
        for (int i = 0; i < kParts; ++i) {
            VInt pairs;
            std::memcpy(&pairs, p + i * 2 * kLanes, sizeof pairs);
            w.part[0][i] = as_floats(pairs << 16);
            w.part[1][i] = as_floats(pairs & static_cast<int32_t>(0xFFFF0000u));
        }
        return w;
    }

    static inline __attribute__((always_inline)) Weights weights(const Value* p) {
#if defined(__AVX512BF16__)
        return {(__m512bh)_mm512_loadu_si512(p)};
#else
        return wide(p);
#endif
    }

    // sums += w . x over one step; x points at the step's inputs.
    static inline __attribute__((always_inline)) void add(Panel& sums, const Weights& w,
                                                          const Value* x) {
#if defined(__AVX512BF16__)
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        sums.part[0] = _mm512_dpbf16_ps(sums.part[0], w.pairs, (__m512bh)_mm512_set1_epi32(pair));
#else
        const float wide[kDepth] = {from_bf16(x[0]), from_bf16(x[1])};
        add_inputs<kDepth>(sums, w, wide);
#endif
    }

    static inline VFloat read(const Value* p) { return load_bf16(p); }
    static inline void write(Value* p, VFloat v) { store_bf16(p, v); }
    static inline float widen(Value x) { return from_bf16(x); }
};

struct Float32 {
    typedef float Value;
    static constexpr int kDepth = 1;

    struct Wide {
        VFloat part[kDepth][kParts];
    };
    typedef Wide Weights;

    static inline __attribute__((always_inline)) Wide wide(const Value* p) {
        Wide w;
        for (int i = 0; i < kParts; ++i) w.part[0][i] = load(p + i * kLanes);
        return w;
    }

    static inline __attribute__((always_inline)) Weights weights(const Value* p) { return wide(p); }

    static inline __attribute__((always_inline)) void add(Panel& sums, const Weights& w,
                                                          const Value* x) {
        add_inputs<kDepth>(sums, w, x);
    }

    static inline VFloat read(const Value* p) { return load(p); }
    static inline void write(Value* p, VFloat v) { store(p, v); }
    static inline float widen(Value x) { return x; }
};

static_assert(Bf16::kDepth * sizeof(Bf16::Value) == elastic_moe::kUnitBytes, "a unit of a panel");
static_assert(Float32::kDepth * sizeof(Float32::Value) == elastic_moe::kUnitBytes,
              "a unit of a panel");

template <class Kind>
static inline int steps_of(int inputs) {
    return (inputs + Kind::kDepth - 1) / Kind::kDepth;
}

}  // namespace
