// The threads of one block as fibers of one CPU thread, with barriers and warp collectives that check their use.
//
// ucontext gives each fiber its stack; switching is by _setjmp/_longjmp, which is 20 times faster because it leaves the
// signal mask alone. Knows nothing of CUDA's names: cuda_runtime.h puts those on top.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = 64 * 1024;

enum Order { forward, backward, shuffled };

// Something that threads wait for: it happens when the generation goes up.
struct Meeting {
    unsigned arrived = 0;
    uint64_t generation = 0;
};

struct Warp {
    Meeting meeting;
    const char* file = nullptr;
    int place = 0;
    uint64_t values[2][warp_size];  // by parity: a fast lane may enter the next collective while others still read
};

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started, finished;
    const Meeting* waits_for;
    uint64_t generation;
    std::unique_ptr<char[]> stack;
};

class Machine {
  public:
    unsigned current = 0;
    std::string error;
    Order order = forward;
    uint64_t seed = 1;

    // Every thread calls body. False, and a message in `error`, if they did what real threads may not.
    bool run(unsigned num_threads, const std::function<void()>& body) {
        error = num_threads == 0 || num_threads % warp_size != 0 ? "the block is not made of full warps" : "";
        if (fibers_.size() < num_threads) fibers_.resize(num_threads);
        for (unsigned i = 0; i < num_threads; ++i) {
            fibers_[i].started = fibers_[i].finished = false;
            fibers_[i].waits_for = nullptr;
        }
        turns_.resize(num_threads);
        std::iota(turns_.begin(), turns_.end(), 0u);
        warps_.assign(num_threads / warp_size, Warp{});
        block_ = Meeting{};
        body_ = &body;
        num_threads_ = num_threads;
        num_finished_ = 0;
        while (error.empty() && num_finished_ < num_threads) {
            if (!sweep() && error.empty()) error = "deadlock: every thread waits";
        }
        return error.empty();
    }

    void barrier() {
        if (num_finished_ > 0) return fail("a barrier after some thread of the block has returned");
        meet(block_, num_threads_);
    }

    // The values of all lanes, valid until the next collective.
    const uint64_t* collective(unsigned mask, uint64_t value, const char* file, int place) {
        Warp& warp = warps_[current / warp_size];
        uint64_t* values = warp.values[warp.meeting.generation % 2];
        if (mask != 0xFFFFFFFF) fail("a collective of part of a warp");
        if (warp.meeting.arrived > 0 && (warp.file != file || warp.place != place)) {
            fail("lanes of one warp are in the collectives of lines " + std::to_string(warp.place) + " and " +
                 std::to_string(place));
        }
        warp.file = file;
        warp.place = place;
        values[current % warp_size] = value;
        meet(warp.meeting, warp_size);
        return values;
    }

    void maybe_yield() {
        if (order == shuffled && random() % 4 == 0) yield();
    }

  private:
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<unsigned> turns_;
    Meeting block_;
    const std::function<void()>* body_ = nullptr;
    unsigned num_threads_ = 0, num_finished_ = 0;
    jmp_buf scheduler_;

    uint64_t random() {  // xorshift
        seed ^= seed << 13;
        seed ^= seed >> 7;
        return seed ^= seed << 17;
    }

    // Lets every thread that can go on do so once. False if there was none.
    bool sweep() {
        if (order == shuffled) {
            for (unsigned i = num_threads_ - 1; i > 0; --i) std::swap(turns_[i], turns_[random() % (i + 1)]);
        }
        bool any = false;
        for (unsigned i = 0; i < num_threads_ && error.empty(); ++i) {
            const unsigned next = turns_[order == backward ? num_threads_ - 1 - i : i];
            const Fiber& fiber = fibers_[next];
            if (fiber.finished || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) continue;
            any = true;
            enter(next);
        }
        return any;
    }

    void enter(unsigned thread) {
        current = thread;
        Fiber& fiber = fibers_[thread];
        if (_setjmp(scheduler_) != 0) return;
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = stack_bytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, &Machine::trampoline, 0);
        setcontext(&fiber.start);
    }

    static void trampoline();

    void leave_for_good() {
        fibers_[current].finished = true;
        ++num_finished_;
        if (block_.arrived > 0) error = "a thread returned while others wait at a barrier";
        if (warps_[current / warp_size].meeting.arrived > 0) error = "a lane returned while its warp waits for it";
        _longjmp(scheduler_, 1);
    }

    void yield() {
        if (_setjmp(fibers_[current].resume) == 0) _longjmp(scheduler_, 1);
    }

    void meet(Meeting& meeting, unsigned expected) {
        const uint64_t generation = meeting.generation;
        if (++meeting.arrived == expected) {
            meeting.arrived = 0;
            ++meeting.generation;
            return;
        }
        fibers_[current].waits_for = &meeting;
        fibers_[current].generation = generation;
        yield();
        fibers_[current].waits_for = nullptr;
    }

    void fail(const std::string& message) {
        error = message;
        _longjmp(scheduler_, 1);  // the block is given up, its fibers are never resumed
    }
};

inline Machine& machine() {
    static Machine instance;
    return instance;
}

inline void Machine::trampoline() {
    (*machine().body_)();
    machine().leave_for_good();
}

inline void fill_with_garbage(unsigned char* from, unsigned char* to) {
    uint32_t x = 0x9E3779B9;
    for (; from != to; ++from) {
        x = x * 1664525 + 1013904223;
        *from = static_cast<unsigned char>(x >> 24);
    }
}

}  // namespace emulator

// What a test may set: the order in which threads run, and the seed of the shuffled one.
extern "C" __attribute__((visibility("default"), used)) inline void emulator_order(int order, uint64_t seed) {
    emulator::machine().order = static_cast<emulator::Order>(order);
    emulator::machine().seed = seed | 1;
}
