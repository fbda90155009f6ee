// Memory for the codes of a layer, which grow chunk by chunk.
#pragma once

#include <cstddef>
#include <vector>

namespace retrieval {

// Memory straight from the system, zeroed, and given back to it: what lives as long as a segment would leave holes
// between what lives for a call. Large pieces lie on huge pages, where the system has them.
class Pages {
 public:
  explicit Pages(std::size_t bytes);
  Pages(Pages&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Pages& operator=(Pages&&) = delete;
  ~Pages();
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* data_;
  std::size_t bytes_;  // whole pages
};

// Chunks that stay where they are, `together` of them in one piece; where there are many, up to 1/share of those that are
// there already, if that makes the piece large enough for huge pages: groups that stand anywhere are found faster there.
class CodeRoom {
 public:
  CodeRoom(std::size_t together, std::size_t share) : together_(together), share_(share) {}
  // Chunk number `at`, which follows the last one or is there; all have the same size.
  std::byte* chunk(std::size_t at, std::size_t bytes);
  std::size_t nbytes() const;
  // At most, for so many chunks.
  double most_bytes(double num_chunks, double bytes) const;

 private:
  const std::size_t together_, share_;
  std::vector<Pages> pieces_;
  std::vector<std::byte*> chunks_;
  std::size_t num_left_ = 0;  // in the last piece
};

}  // namespace retrieval
