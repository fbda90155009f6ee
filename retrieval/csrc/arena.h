// Scratch memory of one call after the other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace retrieval {

struct AlignedFree {
  void operator()(std::byte* pointer) const { std::free(pointer); }
};
using AlignedBytes = std::unique_ptr<std::byte[], AlignedFree>;

// Zeroed, 64-byte aligned.
inline AlignedBytes allocate_aligned(std::size_t bytes) {
  const std::size_t rounded = (bytes + 63) / 64 * 64;
  void* pointer = std::aligned_alloc(64, rounded);
  if (pointer == nullptr) throw std::bad_alloc();
  std::memset(pointer, 0, rounded);
  return AlignedBytes(static_cast<std::byte*>(pointer));
}

// Memory that is kept from call to call: pages once touched stay mapped.
class Arena {
 public:
  template <typename T>
  T* take(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (blocks_.empty() || used_ + bytes > size_) grow(used_ + bytes);
    T* pointer = reinterpret_cast<T*>(blocks_.back().get() + (used_ - base_));
    used_ += bytes;
    return pointer;
  }
  std::size_t used_bytes() const { return used_; }
  std::size_t held_bytes() const { return size_; }
  // Everything taken is void; one block from now on, with some room for calls that need more.
  void reset() {
    if (blocks_.size() > 1) {
      blocks_.clear();
      size_ = used_ + used_ / 8;
      blocks_.push_back(allocate_aligned(size_));
    }
    used_ = base_ = 0;
  }

 private:
  void grow(std::size_t needed) {
    const std::size_t bytes = std::max(needed - used_, std::max<std::size_t>(size_, 1u << 20));
    blocks_.push_back(allocate_aligned(bytes));
    base_ = used_ = size_;
    size_ += bytes;
  }
  std::vector<AlignedBytes> blocks_;
  std::size_t size_ = 0, used_ = 0, base_ = 0;
};

}  // namespace retrieval
