// The few vector operations that the kernels need, in the register width of the level that this
// file is compiled for. Arithmetic uses the vector types of GCC and Clang; only what they cannot
// say portably uses intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VFloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t VInt __attribute__((vector_size(4 * kLanes)));

static inline VFloat load(const float* p) {
    VFloat v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, VFloat v) { std::memcpy(p, &v, sizeof v); }

static inline VFloat broadcast(float x) { return x - VFloat{}; }

// The first `count` floats at p, `fill` in the remaining lanes; reads nothing beyond them.
static inline VFloat load_partial(const float* p, int count, float fill) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = fill;
    std::memcpy(lanes, p, sizeof(float) * static_cast<size_t>(count));
    return load(lanes);
}

// a * b + c: rounded once where the level has FMA, twice elsewhere, and never as the compiler
// pleases (kernels are compiled with -ffp-contract=off): a row's bits must not depend on which
// instance of a template computed it.
static inline VFloat fma(VFloat a, VFloat b, VFloat c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// Lane by lane; b where either is NaN. This is what x86's max instruction does.
static inline VFloat max(VFloat a, VFloat b) { return a > b ? a : b; }

// Bit i is set where lane i of a is greater than b's.
static inline uint32_t greater_mask(VFloat a, VFloat b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps(a, b)));
#else
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a[i] > b[i]) << i;
    return mask;
#endif
}

// Bit i is set where lane i of a equals b's.
static inline uint32_t equal_mask(VFloat a, VFloat b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpeq_ps(a, b)));
#else
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a[i] == b[i]) << i;
    return mask;
#endif
}

// Both reductions fold the upper half onto the lower half until one lane is left.
typedef float VFloat4 __attribute__((vector_size(16)));

static inline VFloat4 max4(VFloat4 a, VFloat4 b) { return a > b ? a : b; }

static inline VFloat4 quarter(VFloat v, int i) {
    VFloat4 part;
    std::memcpy(&part, reinterpret_cast<const char*>(&v) + 16 * i, sizeof part);
    return part;
}

static inline float reduce_max(VFloat v) {
#if defined(__AVX512F__)
    VFloat4 a = max4(max4(quarter(v, 0), quarter(v, 2)), max4(quarter(v, 1), quarter(v, 3)));
#elif defined(__AVX2__)
    VFloat4 a = max4(quarter(v, 0), quarter(v, 1));
#else
    VFloat4 a = v;
#endif
    a = max4(a, __builtin_shufflevector(a, a, 2, 3, 0, 1));
    return a[0] > a[1] ? a[0] : a[1];
}

static inline float reduce_sum(VFloat v) {
#if defined(__AVX512F__)
    VFloat4 a = (quarter(v, 0) + quarter(v, 2)) + (quarter(v, 1) + quarter(v, 3));
#elif defined(__AVX2__)
    VFloat4 a = quarter(v, 0) + quarter(v, 1);
#else
    VFloat4 a = v;
#endif
    a = a + __builtin_shufflevector(a, a, 2, 3, 0, 1);
    return a[0] + a[1];
}

// exp(x) for x <= 0, within 2 units in the last place. NaN gives NaN; results below the smallest
// normal number (x < -87.3) are 0.
//
// x = n ln 2 + r with |r| <= ln(2)/2, ln 2 in two parts so that r is exact to the last bit;
// exp(r) by the polynomial of Cephes' expf; times 2^n through the exponent bits.
static inline VFloat exp_nonpositive(VFloat x) {
    const VFloat rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const VFloat shifted = fma(x, broadcast(1.44269504088896341f), rounder);
    const VFloat n = shifted - rounder;
    VFloat r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);

    VFloat p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;

    VInt exponent;  // n sits in the low mantissa bits of `shifted`
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent - 0x4B400000 + 127) << 23;
    VFloat power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < -87.3365447f ? VFloat{} : p * power;  // NaN is not below, and stays
}

// x * sigmoid(x); NaN stays.
static inline VFloat silu(VFloat x) {
    const VFloat e = exp_nonpositive(x > 0.0f ? -x : x);
    return x * (x > 0.0f ? broadcast(1.0f) : e) / (e + 1.0f);
}

// bfloat16: the upper half of a float.
typedef uint16_t VHalf __attribute__((vector_size(2 * kLanes)));

static inline VFloat as_floats(VInt bits) {
    VFloat v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

static inline VFloat load_bf16(const uint16_t* p) {
    VHalf halves;
    std::memcpy(&halves, p, sizeof halves);
    return as_floats(__builtin_convertvector(halves, VInt) << 16);
}

static inline float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounded to nearest, ties to even; NaN stays NaN.
static inline void store_bf16(uint16_t* p, VFloat v) {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &halves, sizeof halves);
#else
    typedef uint32_t VBits __attribute__((vector_size(4 * kLanes)));
    VBits bits;
    std::memcpy(&bits, &v, sizeof bits);
    const VBits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const VBits quiet = VBits{} + 0x7FC0u;
    const VHalf halves = __builtin_convertvector(v == v ? rounded : quiet, VHalf);
    std::memcpy(p, &halves, sizeof halves);
#endif
}

}  // namespace
