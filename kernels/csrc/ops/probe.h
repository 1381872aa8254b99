// The most that the machine's memory gives: a buffer read once, front to back, by all threads.
#pragma once

#include "core/simd.h"
#include "core/team.h"

namespace {

constexpr int64_t kProbeStep = 256;       // bytes per turn
constexpr int64_t kProbePrefetch = 2048;  // bytes ahead

// Exclusive or of all whole steps of 256 bytes, so that no read can be left out. Every thread reads
// one stretch; `data` is aligned to 64 bytes.
static inline int32_t probe_stretch(const char* data, int64_t bytes) {
    constexpr int kVectors = kProbeStep / static_cast<int>(sizeof(VInt));
    VInt sums[kVectors] = {};
    for (int64_t at = 0; at < bytes; at += kProbeStep) {
        __builtin_prefetch(data + at + kProbePrefetch, 0, 3);
        for (int i = 0; i < kVectors; ++i) {
            VInt v;
            std::memcpy(&v, data + at + i * static_cast<int>(sizeof v), sizeof v);
            sums[i] ^= v;
        }
    }
    int32_t sum = 0;
    for (int i = 0; i < kVectors; ++i)
        for (int lane = 0; lane < kLanes; ++lane) sum ^= sums[i][lane];
    return sum;
}

struct ProbeArgs {
    const char* data;
    int64_t each;
    int parts;
    int32_t sum;
};

static int32_t probe(const char* data, int64_t bytes, int threads) {
    ProbeArgs args = {data, bytes / threads / kProbeStep * kProbeStep, threads, 0};
    run_team(threads, args, [](Member& member, ProbeArgs& a) {
        member.share(a.parts, 1, [&](int64_t part, int64_t) {
            __atomic_fetch_xor(&a.sum, probe_stretch(a.data + a.each * part, a.each),
                               __ATOMIC_RELAXED);
        });
    });
    return args.sum;
}

}  // namespace
