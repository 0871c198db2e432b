// Many small tasks shared among a few threads for the time of one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace ckptd {

// Calls run(0) ... run(tasks - 1), each once, on the calling thread and up to `threads - 1` others; returns when all
// are done. `run` must not throw. Threads are started anew each time: a pool would not survive a fork.
template <typename Run>
void share_tasks(std::size_t tasks, std::size_t threads, const Run& run) {
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t task = next++; task < tasks; task = next++) run(task);
    };
    std::vector<std::thread> helpers;
    try {
        while (helpers.size() + 1 < std::min(threads, tasks)) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // No more threads to be had: those that run will do it all.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace ckptd
