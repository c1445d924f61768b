// Workers and regions: the caller is thread 0, every other one has a mailbox.
#include "cpu/pool.h"

#include <algorithm>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/pool_wait.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace mgf {

// ---- the threads ----

int process_id() {
#if defined(__unix__) || defined(__APPLE__)
    return int(getpid());
#else
    return 0;
#endif
}

namespace {

// A worker's mailbox: `orders` counts the regions it was called to. Others are not disturbed by a region without them.
struct Worker {
    alignas(64) std::atomic<uint32_t> orders{0};
    std::atomic<uint32_t> asleep{0};
    alignas(64) double waited = 0;
    std::thread thread;
};

thread_local const void* running_pool = nullptr;  // whose region this thread is in

}  // namespace

// The threads of one process; what a child process inherits of it cannot be used, nor even be destroyed.
struct Pool::Crew {
    const int process = process_id();
    std::mutex one_region;
    ShedPolicy policy;
    SpinPolicy spin, start_spin;  // of the calling thread: inside regions, and at their end
    Barrier barrier;
    std::vector<std::unique_ptr<Worker>> workers;
    bool started = false;
    const void* pool = nullptr;

    Function function = nullptr;  // of the region that runs; null: stop
    const void* context = nullptr;
    int threads = 1;
    alignas(64) std::atomic<uint32_t> busy{0};
    std::atomic<uint32_t> waiting_for_busy{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;

    std::atomic<int> threads_next;
    std::atomic<double> share{0};

    explicit Crew(int size) : policy(size), threads_next(size) {}
    void start(int size, bool pin);
    void stop();
    void work(int index, Worker& self);
    void perform(Region& region);
    void call(int index);
};

namespace {

// Leaves the pinning be where it fails: it is a wish.
void pin_to(std::thread& thread, int index) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    CPU_ZERO(&allowed);
    CPU_ZERO(&one);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    int left = index % std::max(1, CPU_COUNT(&allowed));
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &allowed) && left-- == 0) {
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(thread.native_handle(), sizeof one, &one);
            return;
        }
    }
#else
    (void)thread, (void)index;
#endif
}

}  // namespace

void Pool::Crew::start(int size, bool pin) {
    started = true;
    try {
        workers.reserve(size_t(size));
        for (int index = 1; index < size; ++index) {
            auto worker = std::make_unique<Worker>();
            worker->thread = std::thread(&Crew::work, this, index, std::ref(*worker));
            if (pin) pin_to(worker->thread, index);
            workers.push_back(std::move(worker));
        }
    } catch (const std::exception&) {  // a limit on processes or on memory: go on with what there is
        policy = ShedPolicy(int(workers.size()) + 1);
    }
}

void Pool::Crew::stop() {
    function = nullptr;
    for (size_t i = 0; i < workers.size(); ++i) call(int(i) + 1);
    for (const auto& worker : workers) worker->thread.join();
}

void Pool::Crew::call(int index) {
    Worker& worker = *workers[size_t(index) - 1];
    worker.orders.fetch_add(1, std::memory_order_seq_cst);
    if (worker.asleep.load(std::memory_order_seq_cst) != 0) wake_all(worker.orders);
}

void Pool::Crew::work(int index, Worker& self) {
    SpinPolicy between, inside;
    running_pool = pool;
    for (uint32_t done = 0;; ++done) {
        double idle = 0;  // between regions: nobody's loss
        wait_for_change(self.orders, done, self.asleep, between, idle);
        if (function == nullptr) return;
        Region region(index, threads, barrier, inside);
        perform(region);
        self.waited = region.waited();
        if (busy.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
            waiting_for_busy.load(std::memory_order_seq_cst) != 0) {
            wake_all(busy);
        }
    }
}

void Pool::Crew::perform(Region& region) {
    try {
        function(context, region);
    } catch (const Barrier::Broken&) {  // another thread failed, and says why
    } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        barrier.abort();
    }
}

// ---- the pool ----

Pool::Pool(int threads, bool pin)
    : size_(threads > 0 ? threads : available_threads()), pin_(pin), crew_(new Crew(size_)) {}

Pool::~Pool() {
    Crew* const crew = crew_.load();
    if (crew->process != process_id()) return;  // its threads are the parent's: a few KB stay behind in the child
    crew->stop();
    delete crew;
}

// After fork the first to come makes a new crew. The old one may hold a locked mutex and threads that do not exist.
Pool::Crew& Pool::crew() {
    Crew* current = crew_.load(std::memory_order_acquire);
    if (current->process == process_id()) return *current;
    auto fresh = std::make_unique<Crew>(size_);
    if (crew_.compare_exchange_strong(current, fresh.get())) return *fresh.release();
    return *current;
}

int Pool::threads() const {
    return crew_.load()->threads_next.load(std::memory_order_relaxed);
}

int Pool::size() const {
    return size_;
}

double Pool::waited_share() const {
    return crew_.load()->share.load(std::memory_order_relaxed);
}

void Pool::run(Function function, const void* context, bool alike) {
    if (running_pool == this) {
        SpinPolicy unused;
        Barrier nobody;
        Region alone(0, 1, nobody, unused);
        function(context, alone);
        return;
    }
    Crew& crew = this->crew();
    const std::lock_guard<std::mutex> lock(crew.one_region);
    crew.pool = this;
    if (!crew.started) crew.start(size_, pin_);
    const int threads = crew.policy.threads();
    const double start = now();

    crew.function = function, crew.context = context, crew.threads = threads;
    crew.failed.store(false), crew.error = nullptr;
    crew.barrier.reset(threads);
    crew.busy.store(uint32_t(threads - 1), std::memory_order_relaxed);
    for (int index = 1; index < threads; ++index) crew.call(index);

    Region region(0, threads, crew.barrier, crew.spin);
    const void* const outer = running_pool;
    running_pool = this;
    crew.perform(region);
    running_pool = outer;
    double waited = region.waited();
    for (uint32_t left; (left = crew.busy.load(std::memory_order_acquire)) != 0;) {
        wait_for_change(crew.busy, left, crew.waiting_for_busy, crew.start_spin, waited);
    }

    const double seconds = now() - start;
    for (int index = 1; index < threads; ++index) {
        waited = std::max(waited, crew.workers[size_t(index) - 1]->waited);
    }
    crew.share.store(seconds > 0 ? waited / seconds : 0, std::memory_order_relaxed);
    if (alike) crew.policy.observe(seconds, waited);
    crew.threads_next.store(crew.policy.threads(), std::memory_order_relaxed);
    if (crew.error) std::rethrow_exception(std::exchange(crew.error, nullptr));
}

}  // namespace mgf
