#include "codes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "rotation.h"
#include "summary.h"

namespace retrieval {
namespace {

constexpr std::int16_t kLeastLargest = 4096;  // largest factor of a chunk, below which its unit is too coarse for the next
constexpr std::size_t kMeansTogether = 8;  // chunks
constexpr std::size_t kKeysShare = 8, kMeansShare = 2;  // one over what may be added at once, and lie idle
constexpr std::int64_t kEncodeKeys = 512;  // keys per task of append

// Grid step of the finer bits over the deviation of a coordinate: least squared error for a Gaussian (Max 1960).
constexpr float kGridStep[kMaxBits + 1] = {0.0f, 1.596f, 0.996f, 0.586f, 0.335f};

// Key `position` as float32; false if it is not finite.
bool read_key(const Rows& rows, std::int64_t position, float* out) {
  const float one = 1.0f;
  std::fill_n(out, rows.head_dim, 0.0f);
  kernels().accumulate(&one, 1, 1, rows, nullptr, position, 1, out);
  float magnitude = 0.0f;
  for (int j = 0; j < rows.head_dim; ++j) magnitude += std::fabs(out[j]);
  return std::isfinite(magnitude);
}

void check_shape(int num_kv_heads, int head_dim, int bits) {
  if (num_kv_heads < 1) throw std::invalid_argument("num_kv_heads must be positive");
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    throw std::invalid_argument("head_dim must be a multiple of 8 up to 256, got " + std::to_string(head_dim));
  }
  if (bits < 1 || bits > kMaxBits) throw std::invalid_argument("bits must be 1 to 4, got " + std::to_string(bits));
}

}  // namespace

// Codes of new keys before they are interleaved.
struct LayerCodes::Encoded {
  std::vector<std::uint8_t> codes;  // [count][shape.dims]
  std::vector<float> factors;
  RunSummaries runs;                // that the new keys fill
  std::vector<float> pending;       // HeadCodes::pending afterwards

  Encoded(std::int64_t count, std::int64_t num_runs, int head_dim, CodeShape shape)
      : codes(static_cast<std::size_t>(count * shape.dims)), factors(static_cast<std::size_t>(count)),
        runs(num_runs, head_dim, shape) {}
};

LayerCodes::LayerCodes(int num_kv_heads, int head_dim, int bits, std::uint64_t seed)
    : num_kv_heads_(num_kv_heads), head_dim_(head_dim), bits_(bits), seed_(seed), key_room_(1, kKeysShare),
      mean_room_(kMeansTogether, kMeansShare) {
  check_shape(num_kv_heads, head_dim, bits);
  heads_.resize(static_cast<std::size_t>(num_kv_heads));
  for (HeadCodes& head : heads_) head.shape = {head_dim, bits};
  maps_ = shared_rotation(head_dim, seed);
}

LayerCodes::LayerCodes(int num_kv_heads, int head_dim, int bits, std::uint64_t seed, const float* key_stretch,
                       const float* query_stretch, const std::vector<CodeShape>& shapes)
    : LayerCodes(num_kv_heads, head_dim, bits, seed) {
  if (shapes.size() != heads_.size()) throw std::invalid_argument("need a shape for each head");
  std::vector<float> maps(2 * heads_.size() * matrix_size());
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    const float *keys = key_stretch + h * matrix_size(), *queries = query_stretch + h * matrix_size();
    if (!are_dual(keys, queries, head_dim)) throw std::invalid_argument("stretches are not each other's inverse transposed");
    set_shape(heads_[h], shapes[h]);
    const Rotation rotation(shapes[h].dims, seed);
    rotation.multiply(keys, head_dim, maps.data() + 2 * h * matrix_size());
    rotation.multiply(queries, head_dim, maps.data() + (2 * h + 1) * matrix_size());
  }
  maps_ = std::make_shared<const std::vector<float>>(std::move(maps));
}

void LayerCodes::set_shape(HeadCodes& head, CodeShape shape) {
  check_shape(1, shape.dims, shape.bits);
  if (shape.dims > head_dim_ || shape.dims * shape.bits > head_dim_ * bits_) {
    throw std::invalid_argument("codes of " + std::to_string(shape.dims) + " dimensions and " +
                                std::to_string(shape.bits) + " bits are too large");
  }
  head.shape = shape;
}

std::int64_t LayerCodes::num_keys() const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  return num_keys_;
}

std::int64_t LayerCodes::nbytes() const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  auto total = static_cast<std::int64_t>(is_stretched() ? maps_->size() * sizeof(float) : 0);
  total += static_cast<std::int64_t>(key_room_.nbytes() + mean_room_.nbytes());
  for (const HeadCodes& head : heads_) {
    const std::size_t num_floats = head.centroid.size() + head.pending.size() + head.scatter.size() +
                                   head.keys.moment.size() + head.means.moment.size();
    total += static_cast<std::int64_t>(num_floats * sizeof(float) + head.chunks.size() * sizeof(CodeChunk));
  }
  return total;
}

std::int64_t LayerCodes::most_bytes(int num_kv_heads, int head_dim, int bits, std::int64_t num_keys, bool is_stretched) {
  check_shape(num_kv_heads, head_dim, bits);
  const auto heads = static_cast<double>(num_kv_heads), dims = static_cast<double>(head_dim);
  const auto bytes_of = [&](int num_groups, CodeShape shape) {
    return heads * static_cast<double>(CodeGroups::bytes_of(num_groups, shape));
  };
  const CodeShape whole{head_dim, bits};
  // Maps and the two moments of what is not coded are a stretched head's.
  const double fixed = heads * sizeof(float) * (dims * (1.0 + kRunKeys) + (is_stretched ? 5.0 : 1.0) * dims * dims);
  const double chunks = std::ceil(static_cast<double>(num_keys) / kChunkKeys);
  const double keys = CodeRoom(1, kKeysShare).most_bytes(chunks, bytes_of(kChunkGroups, whole));
  const double means = CodeRoom(kMeansTogether, kMeansShare).most_bytes(chunks, bytes_of(1, whole.of_means()));
  return static_cast<std::int64_t>(fixed + keys + means + chunks * heads * sizeof(CodeChunk));
}

bool LayerCodes::encode(int head, const Rows& keys, const std::vector<float>& centroid, std::int64_t first,
                        std::int64_t count, Encoded& out) const {
  constexpr int kTogether = 4;
  const auto dims = static_cast<std::size_t>(head_dim_);
  const CodeShape shape = heads_[static_cast<std::size_t>(head)].shape;
  float centred[kTogether * kMaxHeadDim], mapped[kTogether * kMaxHeadDim], run[kRunKeys * kMaxHeadDim];
  const std::vector<float>& pending = heads_[static_cast<std::size_t>(head)].pending;
  // Only the first keys can continue a run.
  if (first == 0) std::copy(pending.begin(), pending.end(), run);
  for (std::int64_t i = first; i < first + count; i += kTogether) {
    const int num = static_cast<int>(std::min<std::int64_t>(kTogether, first + count - i));
    for (int t = 0; t < num; ++t) {
      float* key = centred + t * head_dim_;
      if (!read_key(keys, i + t, key)) return false;
      for (std::size_t j = 0; j < dims; ++j) key[j] -= centroid[j];
    }
    apply_map(key_map(head), centred, num, head_dim_, mapped);
    for (int t = 0; t < num; ++t) {
      std::uint8_t* code = out.codes.data() + (i + t) * shape.dims;
      out.factors[static_cast<std::size_t>(i + t)] = nearest_code(mapped + t * head_dim_, shape, code);
      const std::int64_t position = num_keys_ + i + t;
      std::copy_n(mapped + t * head_dim_, dims, run + position % kRunKeys * head_dim_);
      const std::int64_t number = position / kRunKeys;
      if ((position + 1) % kRunKeys == 0) out.runs.fill(number - num_keys_ / kRunKeys, number, run);
    }
  }
  if (first + count == static_cast<std::int64_t>(out.factors.size())) {
    out.pending.assign(run, run + (num_keys_ + first + count) % kRunKeys * head_dim_);
  }
  return true;
}

void LayerCodes::add_chunk(HeadCodes& head) {
  const std::size_t at = head.chunks.size();
  CodeChunk& chunk = head.chunks.emplace_back();
  const auto place = [&](CodeGroups& groups, int num_groups, auto shape_of, CodeRoom& room) {
    groups.num_groups = num_groups;
    groups.shape = shape_of(head);
    std::size_t before = 0, total = 0;  // bytes of the heads before, and of all
    for (const HeadCodes& each : heads_) {
      const std::size_t bytes = CodeGroups::bytes_of(num_groups, shape_of(each));
      before += &each < &head ? bytes : 0;
      total += bytes;
    }
    groups.codes = reinterpret_cast<std::uint8_t*>(room.chunk(at, total) + before);
    groups.factors = reinterpret_cast<std::int16_t*>(groups.codes + groups.code_bytes());
  };
  place(chunk.keys, kChunkGroups, [](const HeadCodes& each) { return each.shape; }, key_room_);
  place(chunk.means, 1, [](const HeadCodes& each) { return each.shape.of_means(); }, mean_room_);
}

void CodeGroups::follow(const CodeGroups& before) {
  const std::int16_t largest = *std::max_element(before.factors, before.factors + before.num_factors());
  unit = largest >= kLeastLargest ? before.unit : 1.25f * before.unit * static_cast<float>(largest) / 32768.0f;
}

void CodeGroups::put(int slot, const std::uint8_t* code, float factor) {
  std::uint8_t* piece = codes + slot / kGroupKeys * group_bytes() + byte_of(slot % kGroupKeys);
  unsigned packed = 0;
  for (int j = 0, num_bits = 0; j < shape.dims; ++j) {
    packed |= static_cast<unsigned>(code[j]) << num_bits;
    for (num_bits += shape.bits; num_bits >= 8; num_bits -= 8, piece += kGroupKeys) {
      *piece = static_cast<std::uint8_t>(packed);
      packed >>= 8;
    }
  }
  if (factor > unit) {
    // Rare once the largest has been seen: leave room, and restate what is there.
    const float larger = factor * 1.25f, ratio = unit / larger;
    for (int t = 0; t < slot; ++t) {
      factors[t] = static_cast<std::int16_t>(static_cast<float>(factors[t]) * ratio + 0.5f);
    }
    unit = larger;
  }
  factors[slot] = static_cast<std::int16_t>(unit > 0.0f ? factor / unit * 32768.0f + 0.5f : 0.0f);
}

float nearest_code(const float* r, CodeShape shape, std::uint8_t* code) {
  const auto [dims, bits] = shape;
  const int levels = 1 << bits;
  const float middle = 0.5f * static_cast<float>(levels - 1);
  const float norm_squared = std::inner_product(r, r + dims, r, 0.0f);
  const float norm = std::sqrt(norm_squared), root = std::sqrt(static_cast<float>(dims));
  const float inverse_step = norm > 0.0f ? root / (norm * kGridStep[bits]) : 0.0f;
  float along = 0.0f;  // <u, r>
  int found[kMaxHeadDim];
  for (int j = 0; j < dims; ++j) {
    // Truncation of a nonnegative number is its floor; a code at or above the middle has a positive sign bit.
    const float shifted = std::max(0.0f, r[j] * inverse_step + 0.5f * static_cast<float>(levels));
    found[j] = static_cast<int>(std::min(shifted, static_cast<float>(levels - 1)));
  }
  for (int j = 0; j < dims; ++j) {
    along += 2.0f * (static_cast<float>(found[j]) - middle) * r[j];
    code[j] = static_cast<std::uint8_t>(found[j]);
  }
  return along > 0.0f ? norm_squared / along : 0.0f;
}

void LayerCodes::splice(HeadCodes& head, const Encoded& keys, std::int64_t num_new) {
  for (std::int64_t i = 0; i < num_new; ++i) {
    const std::int64_t position = num_keys_ + i;
    const auto at = static_cast<std::size_t>(position / kChunkKeys);
    CodeChunk& chunk = head.chunks[at];
    if (at > 0 && position % kChunkKeys == 0) chunk.keys.follow(head.chunks[at - 1].keys);
    chunk.keys.put(static_cast<int>(position % kChunkKeys), keys.codes.data() + i * head.shape.dims,
                   keys.factors[static_cast<std::size_t>(i)]);
  }
  keys.runs.add_to(head, num_keys_ / kRunKeys);
  head.pending = keys.pending;
}

void LayerCodes::append(const std::vector<Rows>& heads, std::int64_t num_new, ThreadPool& pool) {
  if (num_new == 0) return;
  const std::lock_guard<std::mutex> one_writer(append_mutex_);
  const auto num_heads = static_cast<std::size_t>(num_kv_heads_);
  std::vector<std::vector<float>> centroids(num_heads);
  std::vector<Encoded> encoded;
  encoded.reserve(num_heads);
  for (std::size_t h = 0; h < num_heads; ++h) {
    encoded.emplace_back(num_new, (num_keys_ + num_new) / kRunKeys - num_keys_ / kRunKeys, head_dim_, heads_[h].shape);
  }
  pool.run(num_kv_heads_, [&](std::int64_t h) {
    const auto at = static_cast<std::size_t>(h);
    centroids[at] = heads_[at].centroid;
    if (!centroids[at].empty()) return;
    // The mean of the first keys; a wrong one costs precision, never correctness.
    std::vector<float> weights(static_cast<std::size_t>(std::min<std::int64_t>(num_new, kChunkKeys)));
    std::fill(weights.begin(), weights.end(), 1.0f / static_cast<float>(weights.size()));
    centroids[at].assign(static_cast<std::size_t>(head_dim_), 0.0f);
    kernels().accumulate(weights.data(), 0, 1, heads[at], nullptr, 0, static_cast<int>(weights.size()),
                         centroids[at].data());
  });
  // Tasks end where runs do.
  const std::int64_t before = num_keys_ % kEncodeKeys;
  const std::int64_t tasks_per_head = (before + num_new + kEncodeKeys - 1) / kEncodeKeys;
  std::atomic<bool> is_finite{true};
  pool.run(num_kv_heads_ * tasks_per_head, [&](std::int64_t task) {
    const auto at = static_cast<std::size_t>(task / tasks_per_head);
    const std::int64_t start = task % tasks_per_head * kEncodeKeys - before;
    const std::int64_t first = std::max<std::int64_t>(0, start), end = std::min(start + kEncodeKeys, num_new);
    if (!encode(static_cast<int>(at), heads[at], centroids[at], first, end - first, encoded[at])) is_finite = false;
  });
  if (!is_finite) throw std::invalid_argument("keys hold NaN or infinity");
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  for (std::size_t h = 0; h < num_heads; ++h) {
    heads_[h].centroid = centroids[h];
    while (static_cast<std::int64_t>(heads_[h].chunks.size()) * kChunkKeys < num_keys_ + num_new) add_chunk(heads_[h]);
  }
  pool.run(num_kv_heads_, [&](std::int64_t h) {
    splice(heads_[static_cast<std::size_t>(h)], encoded[static_cast<std::size_t>(h)], num_new);
  });
  num_keys_ += num_new;
}

}  // namespace retrieval
