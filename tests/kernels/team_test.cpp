// The team of threads by itself, for a thread sanitizer: calls of many phases from several callers,
// forks, and helpers that are stopped and started. Prints "done"; anything wrong ends it.
#include <dirent.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "core/team.h"

namespace {

struct Args {
    int phases;
    int64_t pieces;
    int64_t* sums;         // (pieces,) each written by one thread at a time
    const uint8_t* skips;  // (phases,) kept with the call
    int64_t total;         // comes back
};

int64_t expected(int phases, int64_t pieces, const std::vector<uint8_t>& skips) {
    int64_t total = 0;
    std::vector<int64_t> sums(static_cast<size_t>(pieces));
    for (int phase = 0; phase < phases; ++phase) {
        if (skips[static_cast<size_t>(phase)]) continue;
        for (size_t i = 0; i < sums.size(); ++i)
            sums[i] = sums[i] * 3 + phase + static_cast<int64_t>(i);
        for (const int64_t sum : sums) total ^= sum;
    }
    return total;
}

int64_t run(int threads, int phases, int64_t pieces, const std::vector<uint8_t>& skips) {
    std::vector<int64_t> sums(static_cast<size_t>(pieces));
    Args args = {phases, pieces, sums.data(), skips.data(), 0};
    run_team(
        threads, args,
        [](Member& member, Args& a) {
            for (int phase = 0; phase < a.phases; ++phase) {
                if (a.skips[phase]) continue;
                member.share(a.pieces, 3, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) a.sums[i] = a.sums[i] * 3 + phase + i;
                });
                member.alone([&] {
                    for (int64_t i = 0; i < a.pieces; ++i) a.total ^= a.sums[i];
                });
            }
        },
        skips.size(),
        [&](Args& copy, char* memory) {
            std::memcpy(memory, skips.data(), skips.size());
            copy.skips = reinterpret_cast<uint8_t*>(memory);
        });
    return args.total;
}

void check(bool fine, const char* what) {
    if (fine) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
}

void call_often(int calls, unsigned seed) {
    for (int call = 0; call < calls; ++call) {
        seed = seed * 1664525 + 1013904223;
        const int phases = 1 + static_cast<int>(seed >> 8) % 20;
        const int64_t pieces = 1 + (seed >> 16) % 40;
        std::vector<uint8_t> skips(static_cast<size_t>(phases));
        for (size_t i = 0; i < skips.size(); ++i) skips[i] = (seed >> (i % 13)) % 4 == 0;
        const int threads = 1 + static_cast<int>(seed >> 20) % 6;
        check(run(threads, phases, pieces, skips) == expected(phases, pieces, skips), "a sum");
        if (seed % 64 == 0) usleep(500);  // helpers fall asleep
    }
}

void wait_often(int calls) {
    for (int call = 0; call < calls; ++call) {
        int64_t sum = 0;  // on this stack
        run_team_and_wait(4, [&](Member& member) {
            member.share(
                16, 1, [&](int64_t i, int64_t) { __atomic_fetch_add(&sum, i, __ATOMIC_RELAXED); });
        });
        check(sum == 120, "a sum of a call that is waited for");
    }
}

int threads_of_process() {
    int found = 0;
    DIR* const tasks = opendir("/proc/self/task");
    while (const dirent* const entry = readdir(tasks)) found += entry->d_name[0] != '.';
    closedir(tasks);
    return found;
}

void fork_often(int forks) {
    for (int i = 0; i < forks; ++i) {
        const pid_t child = fork();
        if (!child) {
            alarm(20);
            call_often(20, static_cast<unsigned>(i));
            _exit(threads_of_process() > 1 ? 0 : 3);
        }
        int status = 0;
        waitpid(child, &status, 0);
        check(status == 0, "a forked child");
    }
}

// Ends while calls and helpers run, as an interpreter may.
void exit_often(int exits) {
    for (int i = 0; i < exits; ++i) {
        const pid_t child = fork();
        if (!child) {
            alarm(20);
            std::thread([] { call_often(1 << 30, 11); }).detach();
            usleep(static_cast<useconds_t>(137 * (i % 50)));
            std::exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        check(status == 0, "an exit during a call");
    }
}

}  // namespace

int main(int count, char** values) {
    const int calls = count > 1 ? std::atoi(values[1]) : 2000;
    const int forks = count > 2 ? std::atoi(values[2]) : 50;
    check(elastic_moe::helper_count() == 0, "helpers before any call");
    elastic_moe::assume_free_cores(6);  // however busy the machine is
    call_often(calls, 1);
    check(elastic_moe::helper_count() > 0, "helpers");
    wait_often(calls / 4);
    std::vector<std::thread> callers;
    for (unsigned seed = 2; seed < 5; ++seed) callers.emplace_back(call_often, calls / 4, seed);
    for (std::thread& caller : callers) caller.join();
    std::atomic<bool> over{false};
    std::thread stopper([&] {
        while (!over) {
            elastic_moe::stop_threads();
            usleep(200);
        }
    });
    call_often(calls / 4, 7);
    over = true;
    stopper.join();
    elastic_moe::settle_threads();
    fork_often(forks);
    exit_often(forks);
    std::printf("done\n");
}
