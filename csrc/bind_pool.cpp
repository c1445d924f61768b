// Python's view of cpu/pool.h, for tests: regions that meet, fail, sleep or nest, and the decisions behind a pool.
//
// Regions that count for how many threads are worth having are those of `busy` only.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bind_attention.h"
#include "cpu/pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// `count` meetings; returns how often a thread came out of one and missed what another had written before it.
int64_t meet(mgf::Pool& pool, int count) {
    struct alignas(64) Slot {
        int64_t met = 0;
    };
    std::vector<Slot> slots(size_t(pool.size()));
    std::atomic<int64_t> missed{0};
    nb::gil_scoped_release released;
    pool.run(
        [&](mgf::Region& region) {
            for (int i = 1; i <= count; ++i) {
                slots[size_t(region.thread)].met = i;
                region.wait();
                for (int t = 0; t < region.threads; ++t) missed += slots[size_t(t)].met != i;
                region.wait();
            }
        },
        false);
    return missed;
}

// Thread `thread` throws at meeting `at`; the others come to `count` meetings. Returns how many threads began.
int fail(mgf::Pool& pool, int thread, int at, int count) {
    std::atomic<int> began{0};
    nb::gil_scoped_release released;
    pool.run(
        [&](mgf::Region& region) {
            ++began;
            for (int i = 0; i < count; ++i) {
                if (region.thread == thread && i == at) throw std::runtime_error("thread " + std::to_string(thread));
                region.wait();
            }
        },
        false);
    return began;
}

// Every thread asleep for milliseconds[thread] and then meeting the others.
void busy(mgf::Pool& pool, const nb::list& milliseconds) {
    std::vector<double> each;
    for (const auto& value : milliseconds) each.push_back(nb::cast<double>(value));
    if (each.empty()) throw nb::value_error("busy: a number for each thread");
    nb::gil_scoped_release released;
    pool.run([&](mgf::Region& region) {
        const double time = each[size_t(region.thread) % each.size()];
        std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(time));
        region.wait();
    });
}

// A region inside a region, from every thread: returns the largest number of threads an inner one had.
int nested(mgf::Pool& pool) {
    std::atomic<int> most{0};
    nb::gil_scoped_release released;
    pool.run([&](mgf::Region&) {
        pool.run([&](mgf::Region& inner) {
            inner.wait();
            for (int seen = most; inner.threads > seen && !most.compare_exchange_weak(seen, inner.threads);) {
            }
        });
    });
    return most;
}

}  // namespace

void bind_pool(nb::module_& m) {
    nb::class_<mgf::Pool>(m, "Pool", "Threads for parallel regions (csrc/cpu/pool.h).")
        .def(nb::init<int, bool>(), "threads"_a = 0, "pin"_a = false)
        .def_prop_ro("size", &mgf::Pool::size)
        .def_prop_ro("threads", &mgf::Pool::threads)
        .def_prop_ro("waited_share", &mgf::Pool::waited_share)
        .def("meet", &meet, "count"_a)
        .def("fail", &fail, "thread"_a, "at"_a, "count"_a)
        .def("busy", &busy, "milliseconds"_a)
        .def("nested", &nested);
    nb::class_<mgf::ShedPolicy>(m, "ShedPolicy")
        .def(nb::init<int>(), "threads"_a)
        .def_prop_ro("threads", &mgf::ShedPolicy::threads)
        .def("observe", &mgf::ShedPolicy::observe, "seconds"_a, "waited"_a);
    nb::class_<mgf::SpinPolicy>(m, "SpinPolicy")
        .def(nb::init<>())
        .def_ro("budget", &mgf::SpinPolicy::budget)
        .def("observe", &mgf::SpinPolicy::observe, "waited"_a);
    m.def("available_threads", &mgf::available_threads, "root"_a = "", "affinity"_a = 0);
}
