// Pages: an anonymous mapping with huge pages on Linux, the C++ heap elsewhere.
#include "cpu/memory.h"

#include <cstdio>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mgf {

NoRoom::NoRoom(size_t bytes, const char* purpose) noexcept {
    std::snprintf(message_, sizeof message_, "no room for %.1f MiB of %s", double(bytes) / (1 << 20), purpose);
}

#if defined(__linux__)
namespace {

constexpr size_t kHuge = size_t(2) << 20;

// Private, not shared: shared memory gets no transparent huge pages.
unsigned char* map(size_t bytes, const char* purpose) {
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw NoRoom(bytes, purpose);
    return static_cast<unsigned char*>(data);
}

}  // namespace

Pages::Pages(size_t bytes, const char* purpose) {
    if (bytes == 0) return;
    // Small ones stay on small pages: a tiny model would take 2 MB for each of its buffers.
    if (bytes < kHuge) {
        data_ = map(bytes, purpose), bytes_ = bytes;
        return;
    }
    // One huge page more than asked for, so that the rest can begin on the boundary of one; what is left over goes
    // back.
    unsigned char* const all = map(bytes + kHuge, purpose);
    const size_t before = (kHuge - reinterpret_cast<size_t>(all) % kHuge) % kHuge;
    if (before > 0) munmap(all, before);
    const size_t kept = (bytes + 4095) / 4096 * 4096;
    if (before + kept < bytes + kHuge) munmap(all + before + kept, bytes + kHuge - before - kept);
    data_ = all + before, bytes_ = bytes;
    madvise(data_, bytes_, MADV_HUGEPAGE);  // where there are none, small ones do
}

Pages::~Pages() {
    if (data_ != nullptr) munmap(data_, bytes_);
}
#else
Pages::Pages(size_t bytes, const char* purpose) {
    if (bytes == 0) return;
    data_ = static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(64), std::nothrow));
    if (data_ == nullptr) throw NoRoom(bytes, purpose);
    std::memset(data_, 0, bytes_ = bytes);
}

Pages::~Pages() {
    ::operator delete(data_, std::align_val_t(64));
}
#endif

Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

}  // namespace mgf
