// The threads that work on one call: torch's OpenMP team, joined for one parallel region. A call is
// a sequence of phases, and a phase is a number of pieces of work that are taken one by one.
//
// A phase ends when its pieces are done, not when all threads have come: one that the system holds
// up, on a machine with other things to do, is waited for only while it works on a piece, and finds
// its place when it comes back. Barriers would cost a time slice each.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#include <sched.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// Turns of waiting before a thread offers its core to another: some ten microseconds.
constexpr int kSpins = 4000;

// What the threads share; each on a cache line of its own.
struct Team {
    alignas(64) int64_t ticket = 0;  // upper half: the open phase; lower: its pieces not yet taken
    alignas(64) int64_t total = 0;   // pieces of the open phase
    alignas(64) int64_t done = 0;    // of them
};

// One thread's view of its team. All threads go through the same phases in the same order; what
// they read between phases must not change during the call.
class Member {
  public:
    Member(Team& team, int number, int size) : id(number), threads(size), team_(team) {}

    const int id;
    const int threads;

    // Do the next phase, or this thread's part of it. `count()` says how many pieces it has; only
    // one thread asks, when the phase before is done. `make()` gives what works on pieces, and may
    // read what earlier phases wrote; it is called as work(piece, next) with -1 for no next piece.
    template <class Count, class Make>
    void phase(Count count, Make make) {
        ++phase_;
        int64_t total = 0;
        if (leads_) {
            total = count();
            if (!total) return;  // no other thread will notice
            __atomic_store_n(&team_.total, total, __ATOMIC_RELAXED);
            __atomic_store_n(&team_.done, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&team_.ticket, phase_ << 32 | total, __ATOMIC_RELEASE);
            leads_ = false;
        } else if (!wait()) {
            return;
        }
        int64_t now = take(total);
        if (now < 0) return;
        auto work = make();
        while (now >= 0) {
            const int64_t next = take(total);
            work(now, next);
            // No thread is left in a phase that is done: this thread opens the next one.
            leads_ = __atomic_add_fetch(&team_.done, 1, __ATOMIC_ACQ_REL) == total;
            now = next;
        }
    }

    // After the last phase, which no other thread may have noticed: let the others go.
    void finish() {
        alone([] {});
    }

    // A phase of one piece.
    template <class Body>
    void alone(Body body) {
        phase([] { return 1; }, [&] { return [&](int64_t, int64_t) { body(); }; });
    }

    // A phase in which 0..count-1 are handed out in runs of `grain`: body(begin, end).
    template <class Body>
    void share(int64_t count, int64_t grain, Body body) {
        phase([&] { return (count + grain - 1) / grain; },
              [&] {
                  return [&](int64_t piece, int64_t) {
                      const int64_t begin = piece * grain;
                      body(begin, begin + grain < count ? begin + grain : count);
                  };
              });
    }

  private:
    // Until this thread's phase is open; false if it is past.
    bool wait() const {
        for (int turn = 0;; ++turn) {
            const int64_t open = __atomic_load_n(&team_.ticket, __ATOMIC_ACQUIRE) >> 32;
            if (open >= phase_) return open == phase_;
#if defined(__SSE2__)
            _mm_pause();
#endif
#if defined(_OPENMP)
            if (turn >= kSpins) sched_yield();  // another process may need this core
#endif
        }
    }

    // The next piece of this thread's phase, -1 if there is none or the phase is past; with a
    // piece, `total` is set to how many the phase has.
    int64_t take(int64_t& total) {
        int64_t ticket = __atomic_load_n(&team_.ticket, __ATOMIC_ACQUIRE);
        for (;;) {
            const int64_t left = ticket & 0xFFFFFFFF;
            if (ticket >> 32 != phase_ || !left) return -1;
            if (__atomic_compare_exchange_n(&team_.ticket, &ticket, ticket - 1, true,
                                            __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
                // Not before: only who holds a piece knows that the phase is still this one.
                total = __atomic_load_n(&team_.total, __ATOMIC_RELAXED);
                return total - left;
            }
        }
    }

    Team& team_;
    int64_t phase_ = 0;
    bool leads_ = id == 0;
};

// Run `work(member)` on at most `threads` threads.
template <class Work>
static void run_team(int threads, Work work) {
    Team team;
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            Member member(team, omp_get_thread_num(), omp_get_num_threads());
            work(member);
            member.finish();
        }
        return;
    }
#endif
    Member member(team, 0, 1);
    work(member);
}

}  // namespace
