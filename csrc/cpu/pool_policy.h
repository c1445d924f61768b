// When to wait how, and with how many threads to go on: decisions of the pool, pure functions of measured times.
//
// No clock, no thread and no atomic in here, so that tests can play any history. Times are seconds of use: of regions
// that ran, not of a clock on the wall.
#pragma once

#include <algorithm>

namespace mgf {

// How long a thread spins before it asks the kernel to wake it. A wake-up costs 5 to 50 us, six barriers a layer wait
// 1 to 20 us each: spinning is right as long as nobody is taken off his core, and steals from others when somebody is.
struct SpinPolicy {
    static constexpr double kShortest = 1e-6;
    static constexpr double kLongest = 80e-6;

    double budget = kLongest;

    // `waited`: the whole wait, sleep included. Halves after a long one, doubles after a short one.
    void observe(double waited) {
        budget = waited <= kLongest ? std::min(2 * budget, kLongest) : std::max(0.5 * budget, kShortest);
    }
};

// How many threads the next region gets. Waits of 3 to 8 % of a decoding step are healthy; with another busy process
// on the machine they pass 40 %, and a step on two threads then takes longer than on one (43 ms against 29).
class ShedPolicy {
  public:
    static constexpr double kShare = 0.25;  // of a region spent waiting, by the thread that waited most
    static constexpr double kWindow = 0.1;  // seconds of regions that a decision looks at, but for the longest
    static constexpr int kRegions = 4;      // ... and at least so many
    static constexpr double kRetry = 2.0;   // until a shed thread is tried again; doubles while that fails
    static constexpr double kLongestRetry = 30.0;
    static constexpr double kSlower = 1.1;  // regions this much longer without the thread: it was worth having

    explicit ShedPolicy(int threads) : full_(std::max(1, threads)), threads_(full_) {}

    int threads() const { return threads_; }

    // A region took `seconds` on threads() threads, of which the one that waited most waited `waited`.
    void observe(double seconds, double waited) {
        if (full_ == 1) return;
        seconds_ += seconds, waited_ += waited, ++regions_;
        if (seconds > longest_) longest_ = seconds, waited_in_longest_ = waited;
        until_retry_ -= seconds, kept_for_ -= seconds;
        const double counted = seconds_ - longest_;
        if (counted < kWindow || regions_ < kRegions) return;
        const double share = (waited_ - waited_in_longest_) / counted, mean = counted / (regions_ - 1);
        seconds_ = waited_ = longest_ = waited_in_longest_ = 0, regions_ = 0;
        decide(share, mean);
    }

  private:
    void decide(double share, double mean) {
        if (before_ > 0 && mean > kSlower * before_) {  // shedding made it worse: uneven work, not a taken core
            before_ = 0;
            change(threads_ + 1);
            kept_for_ = kLongestRetry;
            return;
        }
        before_ = 0;
        if (share > kShare && threads_ > 1 && kept_for_ <= 0) {
            hold_ = retried_ ? std::min(2 * hold_, kLongestRetry) : kRetry;
            retried_ = false;
            before_ = mean;
            until_retry_ = hold_;
            change(threads_ - 1);
        } else if (threads_ < full_ && until_retry_ <= 0) {
            retried_ = true;
            until_retry_ = kRetry;
            change(threads_ + 1);
        } else if (share <= kShare) {
            retried_ = false;  // a window went well with what there is
        }
    }

    void change(int threads) { threads_ = std::min(std::max(1, threads), full_); }

    int full_, threads_;
    double seconds_ = 0, waited_ = 0;
    // The longest region of a window does not count: the first of a program may take 20 times as long as the second
    // (memory is touched, threads start), and once cost the pool a thread for 2 s.
    double longest_ = 0, waited_in_longest_ = 0;
    int regions_ = 0;
    double before_ = 0;       // mean region before the last shed, until its first window has been judged
    double until_retry_ = 0;  // seconds of use
    double kept_for_ = 0;     // seconds for which shedding is off, because it did not help
    double hold_ = kRetry;
    bool retried_ = false;
};

}  // namespace mgf
