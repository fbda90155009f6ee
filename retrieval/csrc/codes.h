// RaBitQ codes of the keys of one segment and layer, for all its KV heads.
//
// Each key k is centred, rotated and kept as a few bits per dimension and one factor (RaBitQ, arXiv 2405.12497,
// section 3; more bits per dimension: arXiv 2409.09913). With u the centred
// code, r = R(k - c) and q' = R q, the inner product is estimated by <q, c> + f <u, q'>, f = |r|^2 / <u, r>,
// which is unbiased over rotations R. Its standard deviation is at most f |q| |u| sqrt((1 - a^2) / (d - 1)),
// a = cos(u, r); the part behind f |q| is near 0.65 for every key and number of bits, so it needs no storing.
// Deviations from the papers: the grid of the finer bits is set by the key's deviation instead of searched
// for; the rotation is a Hadamard one; all bits are scanned at once, since estimating by the sign bit first and
// by all bits where that does not decide costs more whenever more than one key in a hundred is undecided; and
// before the rotation, keys may be stretched by a matrix M and queries by its inverse transposed, which changes no
// inner product, but where it balances keys that are wide with queries that are narrow, |q| |r| and so the error; and
// of the stretched coordinates only the first ones of a head may be kept, where the others hardly add to a product:
// what they do add deviates as their second moment over the keys tells, and widens the bound.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "code_room.h"
#include "distance.h"
#include "thread_pool.h"

namespace retrieval {

inline constexpr int kChunkGroups = kScanGroups;
inline constexpr int kChunkKeys = kChunkGroups * kGroupKeys;
inline constexpr int kRunKeys = 32;  // neighbours whose mean is kept
inline constexpr int kChunkRuns = kChunkKeys / kRunKeys;
inline constexpr float kRadiusSteps = 32000.0f;  // of the largest radius of a run in a chunk
inline constexpr int kMaxBits = 4;

// Coordinates of a head's keys that codes keep, and bits for each.
struct CodeShape {
  int dims = 0, bits = 0;
  int num_pieces() const { return dims * bits / 8; }  // bytes of a key
  // That of means, whose errors all keys of a run share.
  CodeShape of_means() const { return {dims, std::min(kMaxBits, std::max(3, bits + 1))}; }
};

// Codes of some groups of keys: what scan reads.
struct CodeGroups {
  std::uint8_t* codes = nullptr;      // [num_groups][shape.num_pieces()][kGroupKeys]
  std::int16_t* factors = nullptr;    // [num_groups * kGroupKeys], f in units of unit / 2^15
  float unit = 0.0f;                  // above every f in here
  int num_groups = 0;
  CodeShape shape;

  std::size_t num_factors() const { return static_cast<std::size_t>(num_groups * kGroupKeys); }
  std::size_t code_bytes() const { return static_cast<std::size_t>(num_groups * group_bytes()); }
  std::size_t nbytes() const { return bytes_of(num_groups, shape); }
  // Bytes of one group's codes.
  int group_bytes() const { return shape.num_pieces() * kGroupKeys; }
  // Of so many groups, with their factors.
  static std::size_t bytes_of(int num_groups, CodeShape shape) {
    CodeGroups groups;
    groups.num_groups = num_groups;
    groups.shape = shape;
    return groups.code_bytes() + groups.num_factors() * sizeof(std::int16_t);
  }
  // Begins with the unit of the groups before, unless a smaller one will do: what is made of it serves for both.
  void follow(const CodeGroups& before);
  // Puts a code [shape.dims] into a slot; slots are filled in order.
  void put(int slot, const std::uint8_t* code, float factor);
};

// 2048 keys of one head, and what each full run of 32 of them has in common (summary.h).
struct CodeChunk {
  CodeGroups keys, means;         // of kChunkGroups groups, and of one: the means of the runs
  std::int16_t radii[kChunkRuns] = {};  // distance of the farthest key from its run's mean, in units of radius_unit
  float radius_unit = 0.0f;
  std::uint64_t full_runs = 0;    // bit r: run r is full, and its mean and radius are known
};

// What coordinates without a code add to a product, next to those with one: of some vectors, sums of the second moments
// of the former and of the squared factors.
struct Uncoded {
  std::vector<float> moment;  // [head_dim - dims][head_dim - dims]
  double factors = 0.0;
};

// Codes of one head; read under LayerCodes' lock.
struct HeadCodes {
  CodeShape shape;
  std::vector<float> centroid;     // [head_dim]
  std::vector<CodeChunk> chunks;   // their arrays are the layer's
  std::vector<float> pending;      // [num_keys % kRunKeys][head_dim]: keys of the run that is not yet full, as encoded
  std::vector<float> scatter;      // [head_dim][head_dim]: covariance of keys round the means of their runs, as a sum
  std::int64_t num_scattered = 0;  // over so many keys
  Uncoded keys, means;             // of the same keys, and of the runs' means
};

class LayerCodes {
 public:
  // Throws std::invalid_argument unless head_dim is a multiple of 8 up to kMaxHeadDim and bits 1..4.
  LayerCodes(int num_kv_heads, int head_dim, int bits, std::uint64_t seed);
  // key_stretch, query_stretch: [num_kv_heads][head_dim][head_dim], M and its inverse transposed; shapes: of each head.
  // Throws std::invalid_argument unless the stretches are that to each other, dims are multiples of 8 up to head_dim
  // and codes no larger than those of head_dim and bits.
  LayerCodes(int num_kv_heads, int head_dim, int bits, std::uint64_t seed, const float* key_stretch,
             const float* query_stretch, const std::vector<CodeShape>& shapes);

  int num_kv_heads() const { return num_kv_heads_; }
  int head_dim() const { return head_dim_; }
  int bits() const { return bits_; }  // of a head whose codes keep all coordinates
  std::uint64_t seed() const { return seed_; }
  std::int64_t num_keys() const;
  std::int64_t nbytes() const;
  // What nbytes is at most with that many keys.
  static std::int64_t most_bytes(int num_kv_heads, int head_dim, int bits, std::int64_t num_keys, bool is_stretched);

  // Append num_new keys per head: head h's begin at keys[h]. Throws std::invalid_argument, and adds nothing, if a
  // key is not finite. Searches may run meanwhile; they see all of the new keys or none.
  void append(const std::vector<Rows>& keys, std::int64_t num_new, ThreadPool& pool);

  std::string save() const;
  // Throws std::invalid_argument on bytes that save did not write.
  static std::shared_ptr<LayerCodes> load(const char* data, std::size_t size);

  // Held shared by a search for as long as it reads heads().
  std::shared_mutex& mutex() const { return mutex_; }
  const HeadCodes& head(int h) const { return heads_[static_cast<std::size_t>(h)]; }
  std::int64_t num_keys_locked() const { return num_keys_; }
  bool is_stretched() const { return maps_->size() > matrix_size(); }
  // What rotates, and stretches if so, keys and queries: [head_dim][head_dim].
  const float* key_map(int head) const { return maps_->data() + (is_stretched() ? 2 * head * matrix_size() : 0); }
  const float* query_map(int head) const {
    return maps_->data() + (is_stretched() ? (2 * head + 1) * matrix_size() : 0);
  }

 private:
  struct Encoded;
  // False at a key that is not finite.
  bool encode(int head, const Rows& keys, const std::vector<float>& centroid, std::int64_t first, std::int64_t count,
              Encoded& out) const;
  void splice(HeadCodes& head, const Encoded& keys, std::int64_t num_new);
  void add_chunk(HeadCodes& head);
  std::size_t matrix_size() const { return static_cast<std::size_t>(head_dim_) * static_cast<std::size_t>(head_dim_); }

  void set_shape(HeadCodes& head, CodeShape shape);

  int num_kv_heads_, head_dim_, bits_;
  std::uint64_t seed_;
  // The rotation of all heads, shared by all layers; or for each head the map of its keys and that of its queries.
  std::shared_ptr<const std::vector<float>> maps_;
  std::int64_t num_keys_ = 0;
  std::vector<HeadCodes> heads_;
  CodeRoom key_room_, mean_room_;      // a chunk is one of every head
  std::mutex append_mutex_;            // one writer at a time; taken before mutex_
  mutable std::shared_mutex mutex_;
};

// Nearest code [shape.dims] to r, the coordinates kept of a centred and rotated key, and its factor f; 0 if r is zero.
float nearest_code(const float* r, CodeShape shape, std::uint8_t* code);

}  // namespace retrieval
