// Memory that is read as a stream: on 64-byte boundaries, in huge pages where the system has them.
#pragma once

#include <cstddef>

namespace mgf {

// Zeros at first, and not taken from the machine before they are touched. Throws std::bad_alloc.
class Pages {
  public:
    Pages() = default;
    explicit Pages(size_t bytes);
    ~Pages();
    Pages(Pages&& other) noexcept;
    Pages& operator=(Pages&& other) noexcept;

    unsigned char* get() const { return data_; }
    size_t size() const { return bytes_; }

  private:
    unsigned char* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace mgf
