// What the machine gives at most: a buffer read once by all threads, in several patterns, since
// which one is fastest differs between processors; and multiply-adds that wait for no memory.
#pragma once

#include "core/team.h"
#include "core/tile.h"

namespace {

constexpr int64_t kProbeBytes = 256;      // per turn of a stream
constexpr int64_t kProbePrefetch = 2048;  // bytes ahead
constexpr int64_t kProbePage = 4096;
constexpr int kProbeStreams = 4;

// Exclusive or of 256 bytes, so that no read can be left out.
struct ProbeSum {
    static constexpr int kVectors = kProbeBytes / static_cast<int>(sizeof(VInt));
    VInt sums[kVectors] = {};

    inline __attribute__((always_inline)) void read(const char* data) {
        for (int i = 0; i < kVectors; ++i) {
            VInt v;
            std::memcpy(&v, data + i * static_cast<int>(sizeof v), sizeof v);
            sums[i] ^= v;
        }
    }

    int32_t fold() const {
        int32_t sum = 0;
        for (int i = 0; i < kVectors; ++i)
            for (int lane = 0; lane < kLanes; ++lane) sum ^= sums[i][lane];
        return sum;
    }
};

// One stretch, front to back; `data` is aligned to 64 bytes.
static int32_t read_plain(const char* data, int64_t bytes) {
    ProbeSum sum;
    for (int64_t at = 0; at < bytes; at += kProbeBytes) sum.read(data + at);
    return sum.fold();
}

// The same, one line of each turn prefetched.
static int32_t read_prefetched(const char* data, int64_t bytes) {
    ProbeSum sum;
    for (int64_t at = 0; at < bytes; at += kProbeBytes) {
        __builtin_prefetch(data + at + kProbePrefetch, 0, 3);
        sum.read(data + at);
    }
    return sum.fold();
}

// The same, with the same place of the next page prefetched into the second level, every line.
static int32_t read_next_page(const char* data, int64_t bytes) {
    ProbeSum sum;
    for (int64_t at = 0; at < bytes; at += kProbeBytes) {
        for (int64_t line = 0; line < kProbeBytes; line += 64)
            __builtin_prefetch(data + at + kProbePage + line, 0, 2);
        sum.read(data + at);
    }
    return sum.fold();
}

// Four stretches side by side.
static int32_t read_streams(const char* data, int64_t bytes) {
    ProbeSum sum;
    const int64_t each = bytes / kProbeStreams / kProbeBytes * kProbeBytes;
    for (int64_t at = 0; at < each; at += kProbeBytes)
        for (int stream = 0; stream < kProbeStreams; ++stream) sum.read(data + stream * each + at);
    for (int64_t at = kProbeStreams * each; at < bytes; at += kProbeBytes) sum.read(data + at);
    return sum.fold();
}

typedef int32_t (*ReadPattern)(const char* data, int64_t bytes);
constexpr ReadPattern kReadPatterns[] = {&read_plain, &read_prefetched, &read_next_page,
                                         &read_streams};
constexpr int kReadPatternCount = sizeof kReadPatterns / sizeof kReadPatterns[0];

struct ReadProbeArgs {
    const char* data;
    int64_t each;
    int parts, pattern;
};

// Whole turns of every thread; what is left at the end is not read.
static void probe_read(const char* data, int64_t bytes, int pattern, int threads) {
    ReadProbeArgs args = {data, bytes / threads / kProbeBytes * kProbeBytes, threads, pattern};
    run_team(threads, args, [](Member& member, ReadProbeArgs& a) {
        member.share(a.parts, 1, [&](int64_t part, int64_t) {
            const int32_t sum = kReadPatterns[a.pattern](a.data + a.each * part, a.each);
            __asm__ volatile("" ::"r"(sum));
        });
    });
}

// As many sums as fit into the registers beside weights and inputs, so that none waits for itself.
constexpr int kProbePanels = kTileRows * tile_panels(kTileRows);

// Adds w . x to each sum, `turns` times. noinline: the loop has the registers to itself.
template <class Kind>
static __attribute__((noinline)) void multiply_add(int64_t turns) {
    alignas(64) typename Kind::Value w[kPanel * Kind::kDepth];
    alignas(64) typename Kind::Value x[kTileRows * Kind::kDepth];
    const float values[kPanel] = {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8};
    for (int i = 0; i < kPanel * Kind::kDepth; i += kLanes)
        Kind::write(w + i, load(values + i % kPanel));
    for (int i = 0; i < kTileRows * Kind::kDepth; ++i) x[i] = w[i % kPanel];
    Panel sums[kProbePanels] = {};
    const typename Kind::Weights weights = Kind::weights(w);
    for (int64_t turn = 0; turn < turns; ++turn)
#pragma GCC unroll 16
        for (int i = 0; i < kProbePanels; ++i)
            Kind::add(sums[i], weights, x + i % kTileRows * Kind::kDepth);
    for (const Panel& panel : sums)
        for (const VFloat& part : panel.part) __asm__ volatile("" ::"x"(part[0]));
}

struct MultiplyProbeArgs {
    int64_t turns;
    int parts, bf16;
};

// Every thread does `turns` turns. Returns the multiplications and additions of all.
static int64_t probe_multiply(bool bf16, int64_t turns, int threads) {
    MultiplyProbeArgs args = {turns, threads, bf16};
    run_team(threads, args, [](Member& member, MultiplyProbeArgs& a) {
        member.share(a.parts, 1, [&](int64_t, int64_t) {
            if (a.bf16) multiply_add<Bf16>(a.turns);
            else multiply_add<Float32>(a.turns);
        });
    });
    return 2 * kPanel * (bf16 ? Bf16::kDepth : Float32::kDepth) * kProbePanels * turns * threads;
}

}  // namespace
