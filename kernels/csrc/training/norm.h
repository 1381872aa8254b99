// The gradients of norms and rotations, row by row.
#pragma once

#include <cmath>

#include "ops/norm.h"
#include "training/product.h"

namespace {

static inline float norm_scale(const float* x, int n, float eps) {
    return 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
}

// out = x * scale * gain.
static inline void scale_row(const float* x, float scale, const float* gain, int n, float* out) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * scale * load(gain + i));
    for (; i < n; ++i) out[i] = x[i] * scale * gain[i];
}

// y = x * s * gain with s = 1 / rms(x): from grad, the gradient of y, to
//   grad_x = s * (gain * grad - x * s^2 * mean(gain * grad * x))  (+ also, where given)
//   grad_gain += grad * x * s.
// grad_x may be grad.
static inline void norm_backward(const float* x, float s, const float* gain, const float* grad,
                                 const float* also, int n, float* grad_x, float* grad_gain) {
    VFloat sum = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const VFloat wanted = load(grad + i) * load(x + i);
        sum = fma(wanted, load(gain + i), sum);
        store(grad_gain + i, fma(wanted, broadcast(s), load(grad_gain + i)));
    }
    float total = reduce_sum(sum);
    for (; i < n; ++i) {
        const float wanted = grad[i] * x[i];
        total += wanted * gain[i];
        grad_gain[i] += wanted * s;
    }
    const float pull = total * s * s / static_cast<float>(n);
    for (i = 0; i + kLanes <= n; i += kLanes) {
        const VFloat g = (load(gain + i) * load(grad + i) - load(x + i) * pull) * s;
        store(grad_x + i, also ? g + load(also + i) : g);
    }
    for (; i < n; ++i) {
        const float g = (gain[i] * grad[i] - x[i] * pull) * s;
        grad_x[i] = also ? g + also[i] : g;
    }
}

// The transpose of `rotate`: by the same angles the other way.
static inline void rotate_back(float* x, const float* cos, const float* sin, int head_dim,
                               bool interleaved) {
    const int half = head_dim / 2;
    for (int i = 0; i < half; ++i) {
        float& first = interleaved ? x[2 * i] : x[i];
        float& second = interleaved ? x[2 * i + 1] : x[half + i];
        const float a = first, b = second;
        first = a * cos[i] + b * sin[i];
        second = b * cos[i] - a * sin[i];
    }
}

// out[i] = sum over the rows of `partial`, in their order.
static inline void sum_rows(const float* partial, int64_t rows, int64_t row, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = 0.0f;
    for (int64_t r = 0; r < rows; ++r)
        for (int i = 0; i < n; ++i) out[i] += partial[r * row + i];
}

static inline void zero(float* x, int64_t n) {
    std::memset(x, 0, sizeof(float) * static_cast<size_t>(n));
}

static inline void copy(float* to, const float* from, int64_t n) {
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(n));
}

// Pieces of kBlockRows rows: body(block, first row, rows).
template <class Body>
static inline void share_blocks(Member& member, int64_t rows, Body body) {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    member.share(blocks, 1, [&](int64_t block, int64_t) {
        const int64_t first = block * kBlockRows;
        body(block, first, rows - first < kBlockRows ? rows - first : kBlockRows);
    });
}

}  // namespace
