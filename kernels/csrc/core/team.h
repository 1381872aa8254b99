// How threads work on one call (core/threads.h): a call is a sequence of phases, and a phase is a
// number of pieces of work that are taken one by one.
//
// A phase ends when its pieces are done, not when all threads have come: one that the system holds
// up, on a machine with other things to do, is waited for only while it works on a piece, and finds
// its place when it comes back. Barriers would cost a time slice each.
//
// A thread that comes back may find that the call has long returned. So what is read outside pieces
// (how many layers there are, which of them have rows) lies in the call's copy of its arguments or
// in memory that outlives `settle_threads`; all else is read and written by whoever holds a piece.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/threads.h"

namespace {

using elastic_moe::Call;

// Up to this many numbers, rows are not worth sharing out.
constexpr int64_t kAlone = 8192;

// One thread's view of its team. All threads go through the same phases in the same order; what
// they read between phases must not change during the call.
class Member {
  public:
    Member(Call& call, int number) : id(number), threads(call.threads), call_(call) {}

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
            __atomic_store_n(&call_.total, total, __ATOMIC_RELAXED);
            __atomic_store_n(&call_.done, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&call_.ticket, phase_ << 32 | total, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&call_.waiting, __ATOMIC_SEQ_CST)) elastic_moe::wake_waiting(call_);
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
            leads_ = __atomic_add_fetch(&call_.done, 1, __ATOMIC_ACQ_REL) == total;
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
    bool wait() {
        int64_t open = __atomic_load_n(&call_.ticket, __ATOMIC_ACQUIRE) >> 32;
        if (open < phase_) open = elastic_moe::wait_for_phase(call_, phase_);
        return open == phase_;
    }

    // The next piece of this thread's phase, -1 if there is none or the phase is past; with a
    // piece, `total` is set to how many the phase has.
    int64_t take(int64_t& total) {
        int64_t ticket = __atomic_load_n(&call_.ticket, __ATOMIC_ACQUIRE);
        for (;;) {
            const int64_t left = ticket & 0xFFFFFFFF;
            if (ticket >> 32 != phase_ || !left) return -1;
            if (__atomic_compare_exchange_n(&call_.ticket, &ticket, ticket - 1, true,
                                            __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
                // Not before: only who holds a piece knows that the phase is still this one.
                total = __atomic_load_n(&call_.total, __ATOMIC_RELAXED);
                return total - left;
            }
        }
    }

    Call& call_;
    int64_t phase_ = 0;
    bool leads_ = id == 0;
};

template <class Args>
static void enter_call(Call& call, int id) {
    Member member(call, id);
    reinterpret_cast<void (*)(Member&, Args&)>(call.work)(member,
                                                          *static_cast<Args*>(call.arguments));
    member.finish();
}

// Run `work(member, args)` on at most `threads` threads, all with one copy of `args`, which comes
// back. `work` captures nothing. `keep(args, memory)` copies what pointers in `args` lead to and
// threads read outside pieces, up to `bytes`.
template <class Args, class Work, class Keep>
static void run_team(int threads, Args& args, Work work, size_t bytes, Keep keep) {
    static_assert(std::is_empty<Work>::value, "a late thread would read what was captured");
    static_assert(std::is_trivially_copyable<Args>::value, "arguments are copied as bytes");
    void (*const function)(Member&, Args&) = work;
    const size_t own = (sizeof(Args) + 63) / 64 * 64;
    Call* const call = elastic_moe::begin_call(threads, own + bytes);
    if (!call) {
        Call alone;
        Member member(alone, 0);
        function(member, args);
        return;
    }
    Args& copy = *static_cast<Args*>(call->arguments);
    std::memcpy(call->arguments, &args, sizeof(Args));
    keep(copy, static_cast<char*>(call->arguments) + own);
    call->work = reinterpret_cast<void (*)()>(function);
    call->enter = enter_call<Args>;
    elastic_moe::run_call(*call, false);
    std::memcpy(&args, call->arguments, sizeof(Args));
    elastic_moe::end_call(*call);
}

template <class Args, class Work>
static void run_team(int threads, Args& args, Work work) {
    run_team(threads, args, work, 0, [](Args&, char*) {});
}

// Run `work(member)` on at most `threads` threads, and wait until those that came have left it: it
// may capture and read what it likes. For long calls, as training's.
template <class Work>
static void run_team_and_wait(int threads, Work work) {
    Call* const call = elastic_moe::begin_call(threads, sizeof(Work*));
    if (!call) {
        Call alone;
        Member member(alone, 0);
        work(member);
        return;
    }
    Work* const at = &work;
    std::memcpy(call->arguments, &at, sizeof at);
    call->enter = [](Call& c, int id) {
        Member member(c, id);
        (**static_cast<Work**>(c.arguments))(member);
        member.finish();
    };
    elastic_moe::run_call(*call, true);
    elastic_moe::end_call(*call);
}

}  // namespace
