// Packing a row-major matrix into panels, see values.h: a step of an output is four bytes in both
// kinds (two bfloat16 or one float), so packing transposes 4-byte units. Vectors are those that
// every level has: it waits for memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/constants.h"
#include "core/team.h"

namespace elastic_moe {

// A piece of work, in bytes: long enough to be worth a thread, short enough to share an expert.
constexpr int64_t kPieceBytes = 1 << 17;

struct PackArgs {
    const char* from;   // (outputs, inputs) values of `value_bytes`, 2 or 4
    int64_t row_bytes;  // from one row to the next
    int64_t outputs, inputs;
    int value_bytes;
    char* to;
    int64_t panel_stride;  // panels from one to the next
    int threads;
};

typedef uint32_t Units __attribute__((vector_size(16)));  // of four outputs or four steps

static inline Units load_units(const char* p) {
    Units units;
    std::memcpy(&units, p, sizeof units);
    return units;
}

// Four steps of four outputs: rows become columns.
static inline void transpose_units(const char* from, int64_t row_bytes, char* to) {
    const Units a = load_units(from), b = load_units(from + row_bytes);
    const Units c = load_units(from + 2 * row_bytes), d = load_units(from + 3 * row_bytes);
    const Units ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Units ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Units cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Units cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const Units steps[4] = {__builtin_shufflevector(ab, cd, 0, 1, 4, 5),
                            __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                            __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5),
                            __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(to + i * kStepBytes, &steps[i], sizeof steps[i]);
}

// One panel: `lanes` outputs from `rows` on. What pads the last panel and the last step is zero.
static inline void pack_panel(const PackArgs& a, const char* rows, int64_t lanes, char* panel) {
    const int64_t depth = kUnitBytes / a.value_bytes;
    const int64_t steps = (a.inputs + depth - 1) / depth, whole = a.inputs / depth;
    int64_t step = 0;
    if (lanes == kPanel)
        for (; step + 4 <= whole; step += 4)
            for (int64_t lane = 0; lane < kPanel; lane += 4)
                transpose_units(rows + lane * a.row_bytes + step * kUnitBytes, a.row_bytes,
                                panel + step * kStepBytes + lane * kUnitBytes);
    for (; step < steps; ++step) {
        char units[kStepBytes] = {};
        const size_t bytes = step < whole ? size_t{kUnitBytes} : static_cast<size_t>(a.value_bytes);
        for (int64_t lane = 0; lane < lanes; ++lane)
            std::memcpy(units + kUnitBytes * lane, rows + lane * a.row_bytes + step * kUnitBytes,
                        bytes);
        std::memcpy(panel + step * kStepBytes, units, kStepBytes);
    }
}

static inline void pack(const PackArgs& a) {
    const int64_t depth = kUnitBytes / a.value_bytes;
    const int64_t panel_bytes = (a.inputs + depth - 1) / depth * kStepBytes;
    if (!panel_bytes) return;
    const int64_t grain = panel_bytes < kPieceBytes ? kPieceBytes / panel_bytes : 1;
    run_team_and_wait(a.outputs <= grain * kPanel ? 1 : a.threads, [&](Member& member) {
        member.share((a.outputs + kPanel - 1) / kPanel, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t first = i * kPanel, left = a.outputs - first;
                pack_panel(a, a.from + first * a.row_bytes, left < kPanel ? left : kPanel,
                           a.to + i * a.panel_stride * panel_bytes);
            }
        });
    });
}

// Have the system find pages for fresh memory, on all threads: it clears them, which takes as long
// as all of packing, and threads that work on one huge page wait for each other.
static inline void populate(char* memory, int64_t bytes, int threads) {
    constexpr int64_t kHugePage = 1 << 21, kPage = 1 << 12;
    run_team_and_wait(threads, [&](Member& member) {
        member.share((bytes + kHugePage - 1) / kHugePage, 1, [&](int64_t piece, int64_t) {
            const int64_t begin = piece * kHugePage;
            const int64_t end = begin + kHugePage < bytes ? begin + kHugePage : bytes;
            for (int64_t at = begin; at < end; at += kPage)
                *const_cast<volatile char*>(memory + at) = 0;
        });
    });
}

// Whether one of the numbers has all these bits: the exponent that NaN and infinity have.
template <class Bits>
static inline bool has_exponent(const char* values, int64_t bytes, uint32_t exponent) {
    const Bits mask = static_cast<Bits>(exponent);
    Bits found = 0;
    for (int64_t at = 0; at < bytes; at += static_cast<int64_t>(sizeof(Bits))) {
        Bits value;
        std::memcpy(&value, values + at, sizeof value);
        found |= static_cast<Bits>((value & mask) == mask);
    }
    return found;
}

// Whether none of the numbers, of `value_bytes` 2 or 4, has that exponent.
static inline bool all_finite(const char* values, int64_t bytes, int value_bytes, uint32_t exponent,
                              int threads) {
    const int64_t pieces = (bytes + kPieceBytes - 1) / kPieceBytes;
    int found = 0;
    run_team_and_wait(pieces < 2 ? 1 : threads, [&](Member& member) {
        member.share(pieces, 1, [&](int64_t piece, int64_t) {
            const int64_t begin = piece * kPieceBytes, left = bytes - begin;
            const int64_t count = left < kPieceBytes ? left : kPieceBytes;
            const bool has = value_bytes == 2
                                 ? has_exponent<uint16_t>(values + begin, count, exponent)
                                 : has_exponent<uint32_t>(values + begin, count, exponent);
            if (has) __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
        });
    });
    return !found;
}

}  // namespace elastic_moe
