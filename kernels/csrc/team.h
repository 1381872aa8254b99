// The threads that work on one call: torch's OpenMP team, joined for one parallel region in which
// phases are separated by barriers and work is handed out by a counter.
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

// Turns of waiting before a thread offers its core to another: some milliseconds, the length of a
// time slice. A core given up early is gone for a slice, and then the others wait for this thread:
// beside a busy neighbour, small steps took ten times as long when it was given up at once.
constexpr int kSpins = 400000;

// What the threads share; each on a cache line of its own.
struct Team {
    alignas(64) int32_t arrived = 0;
    alignas(64) int32_t generation = 0;
    alignas(64) int64_t next = 0;
};

// One thread's view of its team.
class Member {
  public:
    Member(Team& team, int id, int threads) : id(id), threads(threads), team_(team) {}

    const int id;
    const int threads;

    // Wait until every thread is here. The last to arrive first runs `alone`.
    template <class Alone>
    void barrier(Alone alone) {
        if (threads == 1) {
            alone();
            team_.next = 0;
            return;
        }
        const int32_t generation = __atomic_load_n(&team_.generation, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&team_.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
            alone();
            team_.arrived = 0;
            team_.next = 0;
            __atomic_store_n(&team_.generation, generation + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int turn = 0; __atomic_load_n(&team_.generation, __ATOMIC_ACQUIRE) == generation;
             ++turn) {
#if defined(__SSE2__)
            _mm_pause();
#endif
#if defined(_OPENMP)
            if (turn >= kSpins) sched_yield();  // another process may need this core
#endif
        }
    }

    void barrier() {
        barrier([] {});
    }

    // The first of the next `count` pieces of work of this phase; barriers begin a new phase.
    int64_t take(int64_t count = 1) {
        if (threads == 1) {
            const int64_t first = team_.next;
            team_.next += count;
            return first;
        }
        return __atomic_fetch_add(&team_.next, count, __ATOMIC_RELAXED);
    }

  private:
    Team& team_;
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
        }
        return;
    }
#endif
    Member member(team, 0, 1);
    work(member);
}

// Hand out 0..count-1 in runs of `grain`: body(begin, end).
template <class Body>
static inline void share(Member& member, int64_t count, int64_t grain, Body body) {
    for (int64_t begin; (begin = member.take(grain)) < count;)
        body(begin, begin + grain < count ? begin + grain : count);
}

}  // namespace
