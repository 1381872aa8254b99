// RMS norm and rotary positions of one row.
#pragma once

#include <cmath>

#include "core/values.h"

namespace {

// Sum of squares of n floats: four chains of vectors, then the rest; fixed by n alone.
static inline float sum_of_squares(const float* x, int n) {
    VFloat sums[4] = {};
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int j = 0; j < 4; ++j) {
            const VFloat v = load(x + i + j * kLanes);
            sums[j] = fma(v, v, sums[j]);
        }
    for (; i < n; i += kLanes) {
        const VFloat v = i + kLanes <= n ? load(x + i) : load_partial(x + i, n - i, 0.0f);
        sums[0] = fma(v, v, sums[0]);
    }
    return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out = x / sqrt(mean(x^2) + eps) * gain; out may be x.
static inline void rms_norm(const float* x, const float* gain, int n, float eps, float* out) {
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * scale * load(gain + i));
    for (; i < n; ++i) out[i] = x[i] * scale * gain[i];
}

// Round n floats to a matrix input, and fill it with zeros up to `size`, a whole number of vectors.
template <class Kind>
static inline void to_inputs(const float* x, int n, int64_t size, typename Kind::Value* out) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) Kind::write(out + i, load(x + i));
    for (; i < size; i += kLanes)
        Kind::write(out + i, i < n ? load_partial(x + i, n - i, 0.0f) : VFloat{});
}

// Rotate the pairs of channels of one head by angles (d/2): pair i is (i, i + d/2), or (2i, 2i + 1)
// if `interleaved`. In place.
static inline void rotate(float* x, const float* cos, const float* sin, int head_dim,
                          bool interleaved) {
    const int half = head_dim / 2;
    int i = 0;
    if (!interleaved) {
        for (; i + kLanes <= half; i += kLanes) {
            const VFloat a = load(x + i), b = load(x + half + i);
            const VFloat c = load(cos + i), s = load(sin + i);
            store(x + i, a * c - b * s);
            store(x + half + i, b * c + a * s);
        }
    }
    for (; i < half; ++i) {
        float& first = interleaved ? x[2 * i] : x[i];
        float& second = interleaved ? x[2 * i + 1] : x[half + i];
        const float a = first, b = second;
        first = a * cos[i] - b * sin[i];
        second = b * cos[i] + a * sin[i];
    }
}

}  // namespace
