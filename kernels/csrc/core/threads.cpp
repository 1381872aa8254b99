#include "core/threads.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <fcntl.h>
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

// What a longer time between calls counts as.
constexpr int64_t kLongestGap = 5 * kMillisecond;

// Turns of waiting within a call before a thread sleeps: some 200 microseconds. One that sleeps has
// not used up its share when there is work again, and runs at once, which one that spins or yields
// does not where others want the cores.
constexpr int kSpins = 20000;

// The stack of a helper: the scratch of an attention piece, with room to spare.
constexpr size_t kStackBytes = 4 << 20;

// Where something else wants the cores, a helper is held up with a piece that the caller waits for,
// and one thread gets more done than two. So as many threads take part as there are cores that
// nothing else wants, by the system's count of runnable threads. It is read so often, and the mean
// of about four readings counts.
constexpr int64_t kReadTime = 4 * kMillisecond;
constexpr double kNewest = 0.25;

struct Team {
    alignas(64) int taken = 0;       // by a caller
    alignas(64) uint64_t calls = 0;  // that helpers were asked to, ever; the low half is waited on
    Call* current = nullptr;
    alignas(64) int sleeping = 0;
    int spinning = 0;
    alignas(64) int64_t spin_time = 0;  // how long helpers wait awake
    uint64_t generation = 0;            // helpers of an earlier one end

    // The caller's, under `taken`.
    int helpers = 0;
    int64_t last_end = 0, gap = kLongestGap;
    double others = 0;  // runnable threads that are not the team's
    int64_t read_at = 0;
    int free_cores = kMaxThreads;
    int assumed_cores = 0;

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

// Sleeping and waking, by the address of a number: its lower or upper half changes before a wake.
#if defined(__linux__)

uint32_t* half_of(void* number, bool upper) {
    return static_cast<uint32_t*>(number) + (upper != (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__));
}

void sleep_while(void* number, bool upper, uint32_t seen) {
    syscall(SYS_futex, half_of(number, upper), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void wake(void* number, bool upper, int count) {
    syscall(SYS_futex, half_of(number, upper), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

#else

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t condition = PTHREAD_COND_INITIALIZER;

void sleep_while(void* number, bool upper, uint32_t seen) {
    pthread_mutex_lock(&mutex);
    while (static_cast<uint32_t>(load(*static_cast<uint64_t*>(number)) >> (upper ? 32 : 0)) == seen)
        pthread_cond_wait(&condition, &mutex);
    pthread_mutex_unlock(&mutex);
}

void wake(void*, bool, int) {
    pthread_mutex_lock(&mutex);
    pthread_cond_broadcast(&condition);
    pthread_mutex_unlock(&mutex);
}

#endif

int64_t now_nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

// After `turn` turns of waiting: pause, or offer the core to another thread.
void wait_a_turn(int turn) {
    pause_briefly();
    if (turn >= kSpins) sched_yield();
}

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
        if (load(team.calls) == seen) sleep_while(&team.calls, false, static_cast<uint32_t>(seen));
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
    const bool started =
        !pthread_create(&thread, &attributes, run_helper,
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

bool watch_forks() { return !pthread_atfork(nullptr, nullptr, forget_helpers); }

// A call that nobody looks at, or null.
Call* unused_call() {
    for (Call& call : team.call)
        if (!load(call.gate)) return &call;
    return nullptr;
}

#if defined(__linux__)

// Threads of the whole system that run or could run, 0 if it does not tell.
int runnable_threads() {
    const int file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    char text[128];
    const ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    text[size > 0 ? size : 0] = 0;
    // "0.20 0.18 0.12 1/80 11206": the fourth column
    const char* at = text;
    for (int column = 0; column < 3 && at; ++column) {
        at = std::strchr(at, ' ');
        if (at) ++at;
    }
    return at ? std::atoi(at) : 0;
}

void count_free_cores() {
    cpu_set_t mask;
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    const int own = 1 + load(team.spinning), runnable = runnable_threads();
    if (online < 1 || !runnable) return;
    team.others += kNewest * ((runnable > own ? runnable - own : 0) - team.others);
    const int left = static_cast<int>(online) - static_cast<int>(team.others + 0.5);
    const int allowed = sched_getaffinity(0, sizeof mask, &mask) ? left : CPU_COUNT(&mask);
    const int free = left < allowed ? left : allowed;
    team.free_cores = free < 1 ? 1 : free;
}

#else

void count_free_cores() {}

#endif

}  // namespace

int64_t wait_for_phase(Call& call, int64_t phase) {
    int64_t open = 0;
    for (int turn = 0; turn < kSpins; ++turn) {
        open = __atomic_load_n(&call.ticket, __ATOMIC_ACQUIRE) >> 32;
        if (open >= phase) return open;
        pause_briefly();
    }
    __atomic_add_fetch(&call.waiting, 1, __ATOMIC_SEQ_CST);
    while ((open = load(call.ticket) >> 32) < phase)
        sleep_while(&call.ticket, true, static_cast<uint32_t>(open));
    __atomic_sub_fetch(&call.waiting, 1, __ATOMIC_SEQ_CST);
    return open;
}

void wake_waiting(Call& call) { wake(&call.ticket, true, INT_MAX); }

Call* begin_call(int threads, size_t bytes) {
    if (threads < 2 || __atomic_exchange_n(&team.taken, 1, __ATOMIC_ACQUIRE)) return nullptr;
    static const bool watching = watch_forks();
    const int64_t now = now_nanoseconds();
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (now >= team.read_at) {
        count_free_cores();
        team.read_at = now + kReadTime;
    }
    const int assumed = __atomic_load_n(&team.assumed_cores, __ATOMIC_RELAXED);
    const int free = assumed ? assumed : team.free_cores;
    if (threads > free) threads = free;
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
    if (gap > kLongestGap) gap = kLongestGap;
    team.gap += (gap - team.gap) / 4;
    store(team.spin_time, team.gap < kSpinTime ? kSpinTime : int64_t{0});
    while (team.helpers < threads - 1 && add_helper()) ++team.helpers;
    call->ticket = call->total = call->done = 0;
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
        if (missing > 0) wake(&team.calls, false, missing);
    }
    call.enter(call, 0);
    __atomic_and_fetch(&call.gate, ~uint64_t{1}, __ATOMIC_ACQ_REL);
    for (int turn = 0; leave && load(call.gate) & 0xFFFFFFFE; ++turn) wait_a_turn(turn);
}

void end_call(Call& call) {
    team.last_end = now_nanoseconds();
    // From here on only helpers that are inside look at it; the last of them leaves it unused.
    for (uint64_t gate = load(call.gate); !__atomic_compare_exchange_n(
             &call.gate, &gate, gate & 0xFFFFFFFF, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);) {
    }
    __atomic_store_n(&team.taken, 0, __ATOMIC_RELEASE);
}

void settle_threads() {
    for (Call& call : team.call)
        for (int turn = 0; load(call.gate) && !(load(call.gate) & 1); ++turn) wait_a_turn(turn);
}

void assume_free_cores(int cores) {
    __atomic_store_n(&team.assumed_cores, cores < 0 ? 0 : cores, __ATOMIC_RELAXED);
}

void stop_threads() {
    for (int turn = 0; __atomic_exchange_n(&team.taken, 1, __ATOMIC_ACQUIRE); ++turn)
        wait_a_turn(turn);
    __atomic_add_fetch(&team.generation, uint64_t{1}, __ATOMIC_SEQ_CST);
    store(team.current, static_cast<Call*>(nullptr));
    __atomic_add_fetch(&team.calls, uint64_t{1}, __ATOMIC_SEQ_CST);
    wake(&team.calls, false, INT_MAX);
    team.helpers = 0;
    __atomic_store_n(&team.taken, 0, __ATOMIC_RELEASE);
}

int helper_count() { return __atomic_load_n(&team.helpers, __ATOMIC_RELAXED); }

}  // namespace elastic_moe
