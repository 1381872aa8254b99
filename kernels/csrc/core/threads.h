// The threads of this process that help with calls: one team, whoever calls. Compiled once, not per
// instruction-set level.
//
// Helpers are never needed: a call is whole if none comes. So the caller waits for pieces of work
// that a helper has taken (core/team.h), but never for a helper to arrive, to wake or to leave. One
// that the system holds up may look at a call long after its caller returned; therefore a call,
// with a copy of its arguments, lives in memory of the team and is used again when the last helper
// has left it.
//
// A second caller at the same time (another engine, another thread) finds the team taken and works
// alone. In a forked child there are no helpers; its first call starts its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace elastic_moe {

// The most threads of one call.
constexpr int kMaxThreads = 256;

// What the threads of one call share; what they write to often has cache lines of its own.
struct alignas(64) Call {
    alignas(64) int64_t ticket = 0;  // upper half: the open phase; lower: its pieces not yet taken
    int64_t waiting = 0;             // threads that sleep until a later phase opens
    alignas(64) int64_t total = 0;   // pieces of the open phase
    alignas(64) int64_t done = 0;    // of them
    alignas(64) uint64_t gate = 0;   // bit 0: open; bits 1 to 31: helpers inside; above: that came
    int threads = 1;                 // most that take part, the caller included
    void (*enter)(Call& call, int id) = nullptr;
    void (*work)() = nullptr;  // what `enter` runs, under the type that it knows
    void* arguments = nullptr;
    size_t capacity = 0;  // bytes at `arguments`
};

// A call of the team with room for `bytes` of arguments, or null: the team is taken, work alone.
// `run_call` and `end_call` must follow.
Call* begin_call(int threads, size_t bytes);

// Let helpers in, take part as thread 0, shut the call; with `leave`, wait until helpers have left.
void run_call(Call& call, bool leave);

// Give the team back.
void end_call(Call& call);

// Wait until no helper looks at any call that has ended: what calls were given may go.
void settle_threads();

// Take so many cores as free instead of asking the system; 0 asks it again.
void assume_free_cores(int cores);

// Have all helpers end; the next call starts new ones.
void stop_threads();

// Helpers that exist.
int helper_count();

// Wait until a phase from `phase` on is open; returns it.
int64_t wait_for_phase(Call& call, int64_t phase);

// Wake threads that sleep, after a phase was opened.
void wake_waiting(Call& call);

}  // namespace elastic_moe
