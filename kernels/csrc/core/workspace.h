// Memory that a call works in: asked for in pieces, kept from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace elastic_moe {

// First every piece is measured, then handed out: run the same code twice.
class Workspace {
  public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() { std::free(data_); }

    // Begin to measure.
    void measure() {
        used_ = 0;
        measuring_ = true;
    }

    // Begin to hand out what was measured.
    void hand_out() {
        if (used_ > size_) {
            std::free(data_);
            size_ = 0;
            data_ = static_cast<char*>(std::aligned_alloc(64, used_));
            if (!data_) throw std::bad_alloc();
            size_ = used_;
        }
#if defined(__SANITIZE_ADDRESS__)
        // Memory between the pieces is poisoned, and memory not written holds NaN.
        ASAN_UNPOISON_MEMORY_REGION(data_, size_);
        std::memset(data_, 0xFF, size_);
        ASAN_POISON_MEMORY_REGION(data_, size_);
#endif
        used_ = 0;
        measuring_ = false;
    }

    template <class T>
    T* take(int64_t count) {
        char* const at = data_ + used_;
        used_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
        if (measuring_) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(at, static_cast<size_t>(count) * sizeof(T));
#endif
        return reinterpret_cast<T*>(at);
    }

    void* take_bytes(int64_t count) { return take<char>(count); }

  private:
    char* data_ = nullptr;
    size_t size_ = 0, used_ = 0;
    bool measuring_ = true;
};

}  // namespace elastic_moe
