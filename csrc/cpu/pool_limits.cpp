// How many processors a process has, when a container or a scheduler gave it some of the machine only.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace mgf {
namespace {

int affinity_count() {
#if defined(__linux__)
    // The kernel refuses a mask smaller than its own; machines with more than 1024 processors exist.
    for (int processors = 1024; processors <= 1 << 17; processors *= 2) {
        cpu_set_t* const set = CPU_ALLOC(size_t(processors));
        if (set == nullptr) break;
        const size_t bytes = CPU_ALLOC_SIZE(size_t(processors));
        CPU_ZERO_S(bytes, set);
        const bool known = sched_getaffinity(0, bytes, set) == 0;
        const int count = known ? CPU_COUNT_S(bytes, set) : 0;
        CPU_FREE(set);
        if (known) return std::max(1, count);
    }
#endif
    return std::max(1, int(std::thread::hardware_concurrency()));
}

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

// Processors' worth of time per period; infinity: no limit, or nothing readable there.
double quota(const std::string& limit, const std::string& period) {
    try {
        const double allowed = std::stod(limit), of = std::stod(period);
        return allowed > 0 && of > 0 ? allowed / of : INFINITY;
    } catch (const std::exception&) {  // "max", an empty or a missing file
        return INFINITY;
    }
}

double quota_v2(const std::string& folder) {
    std::istringstream words(first_line(folder + "/cpu.max"));
    std::string limit, period;
    words >> limit >> period;
    return quota(limit, period);
}

double quota_v1(const std::string& folder) {
    return quota(first_line(folder + "/cpu.cfs_quota_us"), first_line(folder + "/cpu.cfs_period_us"));
}

// The least of a group and of all above it. Inside a container the path may name groups of the host that are not
// visible here; the mount itself, the last one asked, is then the container's own group.
double least(double (*ask)(const std::string&), const std::string& mount, std::string path) {
    double found = ask(mount);
    while (path.size() > 1) {
        found = std::min(found, ask(mount + path));
        path.resize(path.find_last_of('/'));
    }
    return found;
}

bool has(const std::string& controllers, const std::string& name) {
    std::istringstream list(controllers);
    for (std::string word; std::getline(list, word, ',');) {
        if (word == name) return true;
    }
    return false;
}

double cgroup_quota(const std::string& root) {
    const std::string mounts = root + "/sys/fs/cgroup";
    std::ifstream groups(root + "/proc/self/cgroup");
    double found = INFINITY;
    for (std::string line; std::getline(groups, line);) {  // number:controllers:path
        const size_t one = line.find(':'), two = one == std::string::npos ? one : line.find(':', one + 1);
        if (two == std::string::npos) continue;
        const std::string controllers = line.substr(one + 1, two - one - 1), path = line.substr(two + 1);
        if (controllers.empty()) {
            found = std::min(found, least(quota_v2, mounts, path));
            found = std::min(found, least(quota_v2, mounts + "/unified", path));
        } else if (has(controllers, "cpu")) {
            for (const std::string& name : {std::string("cpu"), controllers}) {
                found = std::min(found, least(quota_v1, mounts + "/" + name, path));
            }
        }
    }
    return found;
}

}  // namespace

int available_threads(const std::string& root, int affinity) {
    const int processors = affinity > 0 ? affinity : affinity_count();
    const double limit = cgroup_quota(root);
    return limit < processors ? std::max(1, int(std::ceil(limit))) : processors;
}

}  // namespace mgf
