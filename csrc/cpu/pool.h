// Threads of our own for parallel regions with barriers inside: a decoding step is one region with 144 of them.
//
// Not OpenMP: its threads spin for as long as they like, and one other busy process makes every barrier wait for a
// whole time slice (8 ms for any operation of torch's, measured). Here a wait spins for 80 us at most while waits are
// short, then sleeps; and a pool whose threads wait too much goes on with fewer (pool_policy.h).
//
// A pool belongs to its object: threads start at the first region, die with the object, and are started again in a
// child process after fork. Any number of Python threads may share one (regions run one after the other) or have one
// each. Knows nothing of what runs on it.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>

#include "cpu/pool_policy.h"

namespace mgf {

// Where the threads of a region meet. One per region; reused from meeting to meeting.
class Barrier {
  public:
    // `threads` threads will meet; forgets what happened before. Nobody may be waiting.
    void reset(int threads);

    // Returns when all have arrived; everything written before is then visible to all. Throws Broken after abort().
    // Adds the seconds spent here to `waited`.
    void wait(SpinPolicy& spin, double& waited);

    // One thread will not come: all others leave with Broken, now and at any later meeting.
    void abort();

    struct Broken {};

  private:
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    std::atomic<uint32_t> sleepers_{0};
    std::atomic<bool> broken_{false};
    uint32_t threads_ = 1;
};

// What a function that runs in a region knows: which of how many threads it is, and where to meet the others.
class Region {
  public:
    const int thread, threads;

    Region(int thread, int threads, Barrier& barrier, SpinPolicy& spin)
        : thread(thread), threads(threads), barrier_(barrier), spin_(spin) {}

    void wait() {
        if (threads > 1) barrier_.wait(spin_, waited_);
    }

    // This thread's part of `count` things: contiguous, the same for the same number of threads.
    int64_t first(int64_t count) const { return count * thread / threads; }
    int64_t last(int64_t count) const { return count * (thread + 1) / threads; }

    double waited() const { return waited_; }

  private:
    Barrier& barrier_;
    SpinPolicy& spin_;
    double waited_ = 0;
};

class Pool {
  public:
    // `threads` <= 0: as many as this process may use (available_threads). The calling thread is one of them. Fewer
    // run where the system gives no more. With `pin` each of the others stays on one processor of the affinity mask.
    explicit Pool(int threads = 0, bool pin = false);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Threads of the next region: at most size(), fewer while they would wait for each other too much.
    int threads() const;
    int size() const;
    // Waits of the last region, by the thread that waited most, as a share of the region's time.
    double waited_share() const;

    // Runs body(Region&) on all threads at once; returns when all are through. What a body throws is thrown here (the
    // first, if several do). Regions that are alike (steps) decide how many threads are worth having; `alike` = false
    // keeps others out of that. A region inside a region of the same pool runs on the calling thread alone.
    template <class Body>
    void run(const Body& body, bool alike = true) {
        run([](const void* context, Region& region) { (*static_cast<const Body*>(context))(region); }, &body, alike);
    }

  private:
    using Function = void (*)(const void* context, Region& region);
    struct Crew;

    void run(Function function, const void* context, bool alike);
    Crew& crew();

    const int size_;
    const bool pin_;
    std::atomic<Crew*> crew_;
};

// Another one after fork: how an object knows that its threads and locks were the parent's.
int process_id();

// Processors that this process may use: its affinity mask, cut to the quota of its cgroups (v1 and v2, every level),
// rounded up; at least 1. `root` stands before /proc and /sys, for tests; `affinity` <= 0 asks the system.
int available_threads(const std::string& root = "", int affinity = 0);

}  // namespace mgf
