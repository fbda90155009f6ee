#include "code_room.h"

#include <cstdint>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

namespace retrieval {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

std::byte* map(std::size_t bytes) {
  void* pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pointer == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::byte*>(pointer);
}

}  // namespace

Pages::Pages(std::size_t bytes) : bytes_((bytes + page_bytes() - 1) / page_bytes() * page_bytes()) {
  if (bytes_ < kHugePage) {
    data_ = map(bytes_);
    return;
  }
  // A huge page begins at a multiple of its size; what lies before and behind goes back.
  std::byte* wide = map(bytes_ + kHugePage);
  const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(wide) % kHugePage) % kHugePage;
  data_ = wide + before;
  if (before > 0) munmap(wide, before);
  munmap(data_ + bytes_, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(data_, bytes_, MADV_HUGEPAGE);  // without them it goes slower
#endif
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

std::byte* CodeRoom::chunk(std::size_t at, std::size_t bytes) {
  if (at < chunks_.size()) return chunks_[at];
  if (num_left_ == 0) {
    const std::size_t more = chunks_.size() / share_;
    num_left_ = more * bytes >= kHugePage ? more : together_;
    pieces_.emplace_back(num_left_ * bytes);
    chunks_.push_back(pieces_.back().data());
  } else {
    chunks_.push_back(chunks_.back() + bytes);
  }
  --num_left_;
  return chunks_.back();
}

std::size_t CodeRoom::nbytes() const {
  std::size_t total = 0;
  for (const Pages& pages : pieces_) total += pages.bytes();
  return total;
}

double CodeRoom::most_bytes(double num_chunks, double bytes) const {
  const auto share = static_cast<double>(share_), together = static_cast<double>(together_);
  const double pieces = (num_chunks + together) * (bytes + static_cast<double>(page_bytes()) / together);
  return num_chunks * bytes >= share * static_cast<double>(kHugePage) ? pieces * (1.0 + 1.0 / share) : pieces;
}

}  // namespace retrieval
