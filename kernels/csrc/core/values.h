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

struct Bf16 {
    typedef uint16_t Value;
    static constexpr int kDepth = 2;

    // sums += w . x over one step; x points at the step's inputs.
    struct Weights {
#if defined(__AVX512BF16__)
        __m512bh pairs;
#else
        VFloat low[kParts], high[kParts];
#endif
    };

    static inline __attribute__((always_inline)) Weights weights(const Value* p) {
        Weights w;
#if defined(__AVX512BF16__)
        w.pairs = (__m512bh)_mm512_loadu_si512(p);
#else
        for (int i = 0; i < kParts; ++i) {
            VInt pairs;
            std::memcpy(&pairs, p + i * 2 * kLanes, sizeof pairs);
            w.low[i] = as_floats(pairs << 16);
            w.high[i] = as_floats(pairs & static_cast<int32_t>(0xFFFF0000u));
        }
#endif
        return w;
    }

    static inline __attribute__((always_inline)) void add(Panel& sums, const Weights& w,
                                                          const Value* x) {
#if defined(__AVX512BF16__)
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        sums.part[0] = _mm512_dpbf16_ps(sums.part[0], w.pairs, (__m512bh)_mm512_set1_epi32(pair));
#else
        const VFloat first = broadcast(from_bf16(x[0])), second = broadcast(from_bf16(x[1]));
        for (int i = 0; i < kParts; ++i) {
            sums.part[i] = fma(w.low[i], first, sums.part[i]);
            sums.part[i] = fma(w.high[i], second, sums.part[i]);
        }
#endif
    }

    static inline VFloat read(const Value* p) { return load_bf16(p); }
    static inline void write(Value* p, VFloat v) { store_bf16(p, v); }
    static inline float widen(Value x) { return from_bf16(x); }
};

struct Float32 {
    typedef float Value;
    static constexpr int kDepth = 1;

    struct Weights {
        VFloat part[kParts];
    };

    static inline __attribute__((always_inline)) Weights weights(const Value* p) {
        Weights w;
        for (int i = 0; i < kParts; ++i) w.part[i] = load(p + i * kLanes);
        return w;
    }

    static inline __attribute__((always_inline)) void add(Panel& sums, const Weights& w,
                                                          const Value* x) {
        const VFloat input = broadcast(*x);
        for (int i = 0; i < kParts; ++i) sums.part[i] = fma(w.part[i], input, sums.part[i]);
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
