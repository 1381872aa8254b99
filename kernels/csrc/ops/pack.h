// Packing a row-major matrix into panels, see values.h. No vector code: a step of an output is four
// bytes in both kinds (two bfloat16 or one float), so packing transposes 4-byte units.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/constants.h"

namespace elastic_moe {

// outputs x inputs values of `value_bytes` (2 or 4), rows `row_stride` values apart, into panels
// `panel_stride` panels apart; what pads the last panel and the last step is zero.
static inline void pack(const char* from, int64_t row_stride, int64_t outputs, int64_t inputs,
                        int value_bytes, char* to, int64_t panel_stride) {
    const int64_t depth = kUnitBytes / value_bytes, steps = (inputs + depth - 1) / depth;
    const int64_t whole = inputs / depth;
    for (int64_t first = 0; first < outputs; first += kPanel) {
        const int64_t lanes = outputs - first < kPanel ? outputs - first : kPanel;
        const char* const rows = from + first * row_stride * value_bytes;
        char* const panel = to + first / kPanel * panel_stride * steps * kStepBytes;
        for (int64_t step = 0; step < steps; ++step) {
            char unit[kStepBytes] = {};
            const size_t bytes =
                step < whole ? size_t{kUnitBytes} : static_cast<size_t>(value_bytes);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const char* p = rows + (lane * row_stride + step * depth) * value_bytes;
                if (bytes == kUnitBytes) std::memcpy(unit + kUnitBytes * lane, p, kUnitBytes);
                else std::memcpy(unit + kUnitBytes * lane, p, 2);
            }
            std::memcpy(panel + step * kStepBytes, unit, kStepBytes);
        }
    }
}

}  // namespace elastic_moe
