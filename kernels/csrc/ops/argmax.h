// The most likely token of one row of logits.
#pragma once

#include "core/simd.h"

namespace {

// Where the largest of n > 0 numbers is, the first among equals. Beside a NaN it may be
// anywhere in the row.
static inline int argmax(const float* x, int n) {
    const int whole = n / kLanes * kLanes;
    VFloat most = broadcast(x[0]);
    for (int i = 0; i < whole; i += kLanes) most = max(most, load(x + i));
    float largest = reduce_max(most);
    for (int i = whole; i < n; ++i) largest = x[i] > largest ? x[i] : largest;

    const VFloat wanted = broadcast(largest);
    for (int i = 0; i < whole; i += kLanes) {
        const uint32_t found = equal_mask(load(x + i), wanted);
        if (found) return i + __builtin_ctz(found);
    }
    for (int i = whole; i < n; ++i)
        if (x[i] == largest) return i;
    return 0;
}

}  // namespace
