#include "core/threads.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace elastic_moe {

namespace {

constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000000;

// A helper waits awake for the next call so long, if calls lately came sooner.
constexpr int64_t kSpinTime = 200 * kMicrosecond;

// The stack of a helper: the scratch of an attention piece, with room to spare.
constexpr size_t kStackBytes = 4 << 20;

// Where something else wants the cores, a helper may be held up with a piece that the caller waits
// for, and fewer threads may get more done. How many is found by trying: work per second of numbers
// next to each other is compared over windows of calls. Nothing is tried as long as all threads take
// part and the caller waits for less than this share of its time.
constexpr double kCalmShare = 0.1;
constexpr int64_t kWindow = 40 * kMillisecond;  // inside calls
constexpr int64_t kFirstInterval = 200 * kMillisecond, kLongestInterval = 2000 * kMillisecond;
constexpr double kBetter = 1.05;   // what another number must be to be preferred
constexpr double kRemember = 0.6;  // of earlier windows, when one is added
constexpr int kNumbers = 9;        // all threads, half of them, ...

// Work and time of one number of threads, in its latest windows.
struct Rate {
    double work = 0, seconds = 0;
    int windows = 0;

    double value() const { return seconds > 0 ? work / seconds : 0; }
};

struct Team {
    alignas(64) int taken = 0;  // by a caller
    alignas(64) uint64_t calls = 0;  // that helpers were asked to, ever; the low half is waited on
    Call* current = nullptr;
    alignas(64) int sleeping = 0;
    int spinning = 0;
    alignas(64) int64_t spin_time = 0;  // how long helpers wait awake
    uint64_t generation = 0;            // helpers of an earlier one end

    // The caller's, under `taken`.
    int helpers = 0;
    int64_t last_end = 0, gap = kMillisecond;
    // How many threads take part: `asked` halved so many times.
    int asked = 0, halvings = 0, preferred = 0;
    Rate rate[kNumbers];
    double window_work = 0;
    int64_t window_time = 0, window_waited = 0;
    int64_t try_at = 0, interval = kFirstInterval;
    bool try_more = false;  // threads, next time

    Call call[kMaxThreads + 1];
};

Team team;  // trivially destructible: helpers may outlive static objects

template <class T>
T load(const T& from) {
    return __atomic_load_n(&from, __ATOMIC_SEQ_CST);
}

template <class T>
void store(T& to, T value) {
    __atomic_store_n(&to, value, __ATOMIC_SEQ_CST);
}

void pause_briefly() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

#if defined(__linux__)

uint32_t* word_of(uint64_t& calls) {
    return reinterpret_cast<uint32_t*>(&calls) + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
}

void sleep_while(uint64_t& calls, uint64_t seen) {
    syscall(SYS_futex, word_of(calls), FUTEX_WAIT_PRIVATE, static_cast<uint32_t>(seen), nullptr,
            nullptr, 0);
}

void wake(uint64_t& calls, int count) {
    syscall(SYS_futex, word_of(calls), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

#else

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t condition = PTHREAD_COND_INITIALIZER;

void sleep_while(uint64_t& calls, uint64_t seen) {
    pthread_mutex_lock(&mutex);
    while (load(calls) == seen) pthread_cond_wait(&condition, &mutex);
    pthread_mutex_unlock(&mutex);
}

void wake(uint64_t&, int) {
    pthread_mutex_lock(&mutex);
    pthread_cond_broadcast(&condition);
    pthread_mutex_unlock(&mutex);
}

#endif

// Until there was a call after the one numbered `seen`: awake at first, if that paid lately.
uint64_t next_call(uint64_t seen) {
    const int64_t spin_time = load(team.spin_time);
    if (spin_time) {
        __atomic_add_fetch(&team.spinning, 1, __ATOMIC_SEQ_CST);
        const int64_t until = now_nanoseconds() + spin_time;
        bool found = false;
        do {
            for (int i = 0; i < 64 && !found; ++i) {
                pause_briefly();
                found = load(team.calls) != seen;
            }
        } while (!found && now_nanoseconds() < until);
        __atomic_sub_fetch(&team.spinning, 1, __ATOMIC_SEQ_CST);
    }
    while (load(team.calls) == seen) {
        __atomic_add_fetch(&team.sleeping, 1, __ATOMIC_SEQ_CST);
        if (load(team.calls) == seen) sleep_while(team.calls, seen);
        __atomic_sub_fetch(&team.sleeping, 1, __ATOMIC_SEQ_CST);
    }
    return load(team.calls);
}

// Take part in the call, unless it is shut or has threads enough.
void help(Call& call) {
    uint64_t gate = load(call.gate);
    do {
        if (!(gate & 1)) return;
        if (static_cast<int>(gate >> 32) + 1 >= __atomic_load_n(&call.threads, __ATOMIC_RELAXED))
            return;
    } while (!__atomic_compare_exchange_n(&call.gate, &gate, gate + 2 + (uint64_t{1} << 32), true,
                                          __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    const int id = static_cast<int>(gate >> 32) + 1;
    // The call may have been shut and opened anew for fewer threads since they were read.
    if (id < call.threads) call.enter(call, id);
    __atomic_sub_fetch(&call.gate, 2, __ATOMIC_RELEASE);
}

void* run_helper(void* generation) {
    const uint64_t own = reinterpret_cast<uintptr_t>(generation);
    uint64_t seen = 0;
    while (load(team.generation) == own) {
        Call* const call = load(team.current);
        if (call) help(*call);
        seen = next_call(seen);
    }
    return nullptr;
}

// A helper more; false if the system has none.
bool add_helper() {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, kStackBytes);
    // Signals are for the threads of the program.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const bool started = !pthread_create(
        &thread, &attributes, run_helper,
        reinterpret_cast<void*>(static_cast<uintptr_t>(load(team.generation))));
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    return started;
}

// A fork copies the memory of the team, but not its threads.
void forget_helpers() {
    for (Call& call : team.call) {
        const auto arguments = call.arguments;
        const auto capacity = call.capacity;
        call = Call();
        call.arguments = arguments;
        call.capacity = capacity;
    }
    team.taken = team.sleeping = team.spinning = team.helpers = 0;
    team.current = nullptr;
}

bool watch_forks() {
    return !pthread_atfork(nullptr, nullptr, forget_helpers);
}

// A call that nobody looks at, or null.
Call* unused_call() {
    for (Call& call : team.call)
        if (!load(call.gate)) return &call;
    return nullptr;
}

int threads_after(int asked, int halvings) {
    const int threads = asked >> halvings;
    return threads < 1 ? 1 : threads;
}

// Forget what was found out, for a caller with another number of threads.
void begin_trials(int asked) {
    team.asked = asked;
    team.halvings = team.preferred = 0;
    for (Rate& rate : team.rate) rate = Rate();
    team.window_work = 0;
    team.window_time = team.window_waited = 0;
    team.interval = kFirstInterval;
}

// A window has ended: decide on how many threads the next one runs.
void choose_threads(int64_t now) {
    Rate& rate = team.rate[team.halvings];
    rate.work = kRemember * rate.work + team.window_work;
    rate.seconds = kRemember * rate.seconds + static_cast<double>(team.window_time) * 1e-9;
    ++rate.windows;
    const bool calm =
        static_cast<double>(team.window_waited) < kCalmShare * static_cast<double>(team.window_time);
    team.window_work = 0;
    team.window_time = team.window_waited = 0;

    if (team.halvings != team.preferred) {  // a trial, until it has as many windows
        if (rate.windows < team.rate[team.preferred].windows && rate.windows < 3) return;
        if (rate.value() > kBetter * team.rate[team.preferred].value()) {
            team.preferred = team.halvings;
            team.interval = kFirstInterval;
        } else {
            team.halvings = team.preferred;
            if (team.interval < kLongestInterval) team.interval *= 2;
        }
        team.try_at = now + team.interval;
        return;
    }
    if (now < team.try_at || (team.preferred == 0 && calm)) return;
    const bool more = team.preferred > 0, fewer = threads_after(team.asked, team.preferred) > 1;
    if (!more && !fewer) return;
    team.try_more = more && (!fewer || !team.try_more);
    team.halvings = team.preferred + (team.try_more ? -1 : 1);
    team.rate[team.halvings].windows = 0;
}

}  // namespace

int64_t now_nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

void wait_a_turn(int turn) {
    pause_briefly();
    if (turn >= kSpins) sched_yield();  // another process may need this core
}

Call* begin_call(int threads, size_t bytes) {
    if (threads < 2 || __atomic_exchange_n(&team.taken, 1, __ATOMIC_ACQUIRE)) return nullptr;
    static const bool watching = watch_forks();
    const int64_t now = now_nanoseconds();
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads != team.asked) begin_trials(threads);
    Call* const call = watching ? unused_call() : nullptr;
    if (call && call->capacity < bytes) {
        std::free(call->arguments);
        call->capacity = (bytes + 63) / 64 * 64;
        call->arguments = std::aligned_alloc(64, call->capacity);
        if (!call->arguments) call->capacity = 0;
    }
    if (!call || !call->arguments) {
        __atomic_store_n(&team.taken, 0, __ATOMIC_RELEASE);
        return nullptr;
    }
    int64_t gap = now - team.last_end;
    if (gap > kMillisecond) gap = kMillisecond;
    team.gap += (gap - team.gap) / 8;
    store(team.spin_time, team.gap < kSpinTime ? kSpinTime : int64_t{0});
    threads = threads_after(threads, team.halvings);
    while (team.helpers < threads - 1 && add_helper()) ++team.helpers;
    call->ticket = call->total = call->done = 0;
    call->started = now;
    call->waited = 0;
    __atomic_store_n(&call->threads, threads, __ATOMIC_RELAXED);
    return call;
}

void run_call(Call& call, bool leave) {
    if (call.threads == 1) {
        call.enter(call, 0);
        return;
    }
    __atomic_store_n(&call.gate, uint64_t{1}, __ATOMIC_RELEASE);
    store(team.current, &call);
    __atomic_add_fetch(&team.calls, uint64_t{1}, __ATOMIC_SEQ_CST);
    if (load(team.sleeping)) {
        const int missing = call.threads - 1 - load(team.spinning);
        if (missing > 0) wake(team.calls, missing);
    }
    call.enter(call, 0);
    __atomic_and_fetch(&call.gate, ~uint64_t{1}, __ATOMIC_ACQ_REL);
    for (int turn = 0; leave && load(call.gate) & 0xFFFFFFFE; ++turn) wait_a_turn(turn);
}

void end_call(Call& call, double work) {
    team.last_end = now_nanoseconds();
    if (work > 0) {
        team.window_work += work;
        team.window_time += team.last_end - call.started;
        team.window_waited += call.waited;
        if (team.window_time >= kWindow) choose_threads(team.last_end);
    }
    // From here on only helpers that are inside look at it; the last of them leaves it unused.
    for (uint64_t gate = load(call.gate);
         !__atomic_compare_exchange_n(&call.gate, &gate, gate & 0xFFFFFFFF, true, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE);) {
    }
    __atomic_store_n(&team.taken, 0, __ATOMIC_RELEASE);
}

void settle_threads() {
    for (Call& call : team.call)
        for (int turn = 0; load(call.gate) && !(load(call.gate) & 1); ++turn) wait_a_turn(turn);
}

void stop_threads() {
    for (int turn = 0; __atomic_exchange_n(&team.taken, 1, __ATOMIC_ACQUIRE); ++turn)
        wait_a_turn(turn);
    __atomic_add_fetch(&team.generation, uint64_t{1}, __ATOMIC_SEQ_CST);
    store(team.current, static_cast<Call*>(nullptr));
    __atomic_add_fetch(&team.calls, uint64_t{1}, __ATOMIC_SEQ_CST);
    wake(team.calls, INT_MAX);
    team.helpers = 0;
    __atomic_store_n(&team.taken, 0, __ATOMIC_RELEASE);
}

int helper_count() {
    return __atomic_load_n(&team.helpers, __ATOMIC_RELAXED);
}

}  // namespace elastic_moe
