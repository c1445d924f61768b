// Futex, spinning, and the barrier. The only orderings that are not plain acquire/release are between "I go to sleep"
// and "somebody sleeps, wake him": both sides write, then read what the other writes; sequential consistency there.
#include "cpu/pool_wait.h"

#include <chrono>
#include <thread>

#include "cpu/pool.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace mgf {
namespace {

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();  // 40 ns on processors since Skylake, 4 before
#elif defined(__aarch64__) && defined(__GNUC__)
    asm volatile("isb");
#endif
}

// Sleeps while `word` holds `value`; may return early. The caller looks again.
void sleep_on(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
    static_assert(sizeof(word) == 4, "a futex is 32 bits");
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    (void)word, (void)value;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

}  // namespace

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
    (void)word;  // sleepers look by themselves
#endif
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

uint32_t wait_for_change(std::atomic<uint32_t>& word, uint32_t value, std::atomic<uint32_t>& sleepers, SpinPolicy& spin,
                         double& waited) {
    uint32_t seen = word.load(std::memory_order_acquire);
    if (seen != value) return seen;
    const double start = now();
    double passed = 0;
    while (seen == value && passed < spin.budget) {
        for (int i = 0; i < 16 && seen == value; ++i) {
            relax();
            seen = word.load(std::memory_order_acquire);
        }
        passed = now() - start;
    }
    if (seen == value) {
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        while ((seen = word.load(std::memory_order_seq_cst)) == value) sleep_on(word, value);
        sleepers.fetch_sub(1, std::memory_order_relaxed);
        passed = now() - start;
    }
    spin.observe(passed);
    waited += passed;
    return seen;
}

void Barrier::reset(int threads) {
    threads_ = uint32_t(threads);
    arrived_.store(0, std::memory_order_relaxed);
    broken_.store(false, std::memory_order_relaxed);
}

void Barrier::wait(SpinPolicy& spin, double& waited) {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (broken_.load(std::memory_order_relaxed)) throw Broken();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) != 0) wake_all(generation_);
        return;
    }
    wait_for_change(generation_, generation, sleepers_, spin, waited);
    if (broken_.load(std::memory_order_relaxed)) throw Broken();
}

// A thread that comes to wait() during this finds `broken_` set, or waits for a generation that has passed already.
void Barrier::abort() {
    broken_.store(true, std::memory_order_seq_cst);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    wake_all(generation_);
}

}  // namespace mgf
