// Memory that is read as a stream: on 64-byte boundaries, in huge pages where the system has them.
#pragma once

#include <cstddef>
#include <new>

namespace mgf {

// A std::bad_alloc (a MemoryError in Python) that says how much was asked for, and what for.
class NoRoom : public std::bad_alloc {
  public:
    NoRoom(size_t bytes, const char* purpose) noexcept;
    const char* what() const noexcept override { return message_; }

  private:
    char message_[128];  // in here, as there may be no room elsewhere
};

// Zeros at first, and not taken from the machine before they are touched. Throws NoRoom.
class Pages {
  public:
    Pages() = default;
    Pages(size_t bytes, const char* purpose);
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
