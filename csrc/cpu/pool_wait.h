// Waiting for another thread: spin for a while, then sleep in the kernel. What pool.cpp and its barrier share.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/pool_policy.h"

namespace mgf {

double now();  // seconds, of a clock that never goes back

// Wakes all that sleep on `word`.
void wake_all(std::atomic<uint32_t>& word);

// Returns the value of `word` once it is not `value` any more. Whoever changes it wakes when `sleepers` is not zero.
uint32_t wait_for_change(std::atomic<uint32_t>& word, uint32_t value, std::atomic<uint32_t>& sleepers, SpinPolicy& spin,
                         double& waited);

}  // namespace mgf
