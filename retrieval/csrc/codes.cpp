#include "codes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace retrieval {
namespace {

constexpr char kMagic[8] = {'R', 'B', 'Q', 'C', 'O', 'D', 'E', '1'};
constexpr std::int64_t kEncodeKeys = 512;  // keys per task of append

// Grid step of the finer bits over the deviation of a coordinate: least squared error for a Gaussian (Max 1960).
constexpr float kGridStep[kMaxBits + 1] = {0.0f, 1.596f, 0.996f, 0.586f, 0.335f};

// splitmix64: small, and the same everywhere.
std::uint64_t next_random(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

std::uint16_t bf16_nearest(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

std::uint16_t bf16_up(float nonnegative) {
  std::uint32_t bits;
  std::memcpy(&bits, &nonnegative, 4);
  return static_cast<std::uint16_t>((bits + 0xffffu) >> 16);
}

float dot(const float* a, const float* b, int n) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Key `position` as float32; false if it is not finite.
bool read_key(const Rows& rows, std::int64_t position, float* out) {
  const float one = 1.0f;
  std::fill_n(out, rows.head_dim, 0.0f);
  kernels().accumulate(&one, 1, 1, rows, nullptr, position, 1, out);
  float magnitude = 0.0f;
  for (int j = 0; j < rows.head_dim; ++j) magnitude += std::fabs(out[j]);
  return std::isfinite(magnitude);
}

// In-place Walsh-Hadamard transform of n (a power of two) values, scaled to be orthogonal.
void hadamard(float* x, int n) {
  for (int width = 1; width < n; width *= 2) {
    for (int block = 0; block < n; block += 2 * width) {
      for (int i = block; i < block + width; ++i) {
        const float a = x[i], b = x[i + width];
        x[i] = a + b;
        x[i + width] = a - b;
      }
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (int i = 0; i < n; ++i) x[i] *= scale;
}

}  // namespace

Rotation::Rotation(int head_dim, std::uint64_t seed) : head_dim_(head_dim), span_(1) {
  while (span_ * 2 <= head_dim) span_ *= 2;
  std::uint64_t state = seed;
  signs_.resize(static_cast<std::size_t>(kRounds * head_dim));
  for (float& sign : signs_) sign = next_random(state) >> 63 ? 1.0f : -1.0f;
}

void Rotation::apply(float* vector) const {
  for (int round = 0; round < kRounds; ++round) {
    const float* signs = signs_.data() + round * head_dim_;
    for (int j = 0; j < head_dim_; ++j) vector[j] *= signs[j];
    hadamard(vector + (round % 2 == 0 ? 0 : head_dim_ - span_), span_);
  }
}

void AlignedFree::operator()(std::byte* pointer) const { std::free(pointer); }

AlignedBytes allocate_aligned(std::size_t bytes) {
  const std::size_t rounded = (bytes + 63) / 64 * 64;
  void* pointer = std::aligned_alloc(64, rounded);
  if (pointer == nullptr) throw std::bad_alloc();
  std::memset(pointer, 0, rounded);
  return AlignedBytes(static_cast<std::byte*>(pointer));
}

// Codes of a run of keys before they are interleaved.
struct LayerCodes::Encoded {
  std::vector<std::uint8_t> codes;  // [count][head_dim]
  std::vector<float> coarse, fine, error;

  void resize(std::int64_t count, int head_dim) {
    codes.resize(static_cast<std::size_t>(count * head_dim));
    coarse.resize(static_cast<std::size_t>(count));
    fine.resize(static_cast<std::size_t>(count));
    error.resize(static_cast<std::size_t>(count));
  }
};

LayerCodes::LayerCodes(int num_kv_heads, int head_dim, int bits, std::uint64_t seed)
    : num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      bits_(bits),
      seed_(seed),
      rotation_(head_dim >= 8 && head_dim <= kMaxHeadDim ? head_dim : 8, seed) {
  if (num_kv_heads < 1) throw std::invalid_argument("num_kv_heads must be positive");
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    throw std::invalid_argument("head_dim must be a multiple of 8 up to 256, got " + std::to_string(head_dim));
  }
  if (bits < 1 || bits > kMaxBits) throw std::invalid_argument("bits must be 1 to 4, got " + std::to_string(bits));
  heads_.resize(static_cast<std::size_t>(num_kv_heads));
}

std::int64_t LayerCodes::num_keys() const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  return num_keys_;
}

std::int64_t LayerCodes::nbytes() const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  const std::int64_t chunk_bytes =
      static_cast<std::int64_t>(sizeof(CodeChunk)) + std::int64_t{bits_} * kChunkGroups * plane_bytes(head_dim_);
  std::int64_t total = 0;
  for (const HeadCodes& head : heads_) {
    total += static_cast<std::int64_t>(head.chunks.size()) * chunk_bytes + std::int64_t{head_dim_} * 4;
  }
  return total;
}

bool LayerCodes::encode(const Rows& keys, const std::vector<float>& centroid, std::int64_t first, std::int64_t count,
                        Encoded& out) const {
  const auto dims = static_cast<std::size_t>(head_dim_);
  const int levels = 1 << bits_;
  const float middle = 0.5f * static_cast<float>(levels - 1);
  const float root = std::sqrt(static_cast<float>(head_dim_));
  float r[kMaxHeadDim];
  for (std::int64_t i = first; i < first + count; ++i) {
    if (!read_key(keys, i, r)) return false;
    for (std::size_t j = 0; j < dims; ++j) r[j] -= centroid[j];
    rotation_.apply(r);
    const float norm_squared = dot(r, r, head_dim_);
    const float norm = std::sqrt(norm_squared);
    const float inverse_step = norm > 0.0f ? root / (norm * kGridStep[bits_]) : 0.0f;
    std::uint8_t* code = out.codes.data() + static_cast<std::size_t>(i) * dims;
    float absolute = 0.0f, along = 0.0f, length = 0.0f;  // <sign, r>, <u, r>, <u, u>, in steps of u
    for (std::size_t j = 0; j < dims; ++j) {
      // Truncation of a nonnegative number is its floor; a code at or above the middle has a positive sign bit.
      const float shifted = r[j] * inverse_step + 0.5f * static_cast<float>(levels);
      const float clamped = shifted < 0.0f ? 0.0f : shifted > static_cast<float>(levels - 1) ? static_cast<float>(levels - 1) : shifted;
      const auto level = static_cast<std::uint8_t>(clamped);
      const float u = 2.0f * (static_cast<float>(level) - middle);
      code[j] = level;
      absolute += std::fabs(r[j]);
      along += u * r[j];
      length += u * u;
    }
    const auto at = static_cast<std::size_t>(i);
    if (!(along > 0.0f)) {
      out.coarse[at] = out.fine[at] = out.error[at] = 0.0f;
      continue;
    }
    const float cosine_squared = std::min(1.0f, along * along / (length * norm_squared));
    out.coarse[at] = norm_squared / absolute;
    out.fine[at] = norm_squared / along;
    out.error[at] = norm * std::sqrt((1.0f / cosine_squared - 1.0f) / static_cast<float>(head_dim_ - 1));
  }
  return true;
}

void LayerCodes::splice(HeadCodes& head, const Encoded& keys, std::int64_t num_new) {
  const int bytes = plane_bytes(head_dim_);
  for (std::int64_t i = 0; i < num_new; ++i) {
    const std::int64_t position = num_keys_ + i;
    const int slot = static_cast<int>(position % kChunkKeys);
    if (slot == 0) {
      head.chunks.push_back(std::make_unique<CodeChunk>());
      head.chunks.back()->planes = allocate_aligned(static_cast<std::size_t>(bits_) * kChunkGroups * static_cast<std::size_t>(bytes));
    }
    CodeChunk& chunk = *head.chunks.back();
    const std::uint8_t* code = keys.codes.data() + static_cast<std::size_t>(i) * static_cast<std::size_t>(head_dim_);
    for (int p = 0; p < bits_; ++p) {
      auto* plane = reinterpret_cast<std::uint8_t*>(chunk.planes.get()) +
                    (p * kChunkGroups + slot / kGroupKeys) * bytes + slot % kGroupKeys;
      const int shift = bits_ - 1 - p;
      for (int s = 0; s < head_dim_ / 8; ++s) {
        unsigned packed = 0;
        for (int b = 0; b < 8; ++b) packed |= ((code[s * 8 + b] >> shift) & 1u) << b;
        plane[s * kGroupKeys] = static_cast<std::uint8_t>(packed);
      }
    }
    const auto at = static_cast<std::size_t>(i);
    if (keys.coarse[at] > chunk.coarse_unit) {
      // Rare once a chunk has seen its largest key: leave room, and restate what is there.
      const float unit = std::max(keys.coarse[at] * 1.25f, 1e-30f);
      const float ratio = chunk.coarse_unit / unit;
      for (int t = 0; t < slot; ++t) {
        chunk.coarse[t] = static_cast<std::int16_t>(std::ceil(static_cast<float>(chunk.coarse[t]) * ratio));
      }
      chunk.coarse_unit = unit;
    }
    chunk.coarse[slot] = chunk.coarse_unit > 0.0f ? static_cast<std::int16_t>(std::min(
                             32767.0f, std::ceil(keys.coarse[at] / chunk.coarse_unit * 32767.0f)))
                                                  : std::int16_t{0};
    chunk.fine[slot] = bf16_nearest(keys.fine[at]);
    chunk.error[slot] = bf16_up(keys.error[at]);
  }
}

void LayerCodes::append(const std::vector<Rows>& heads, std::int64_t num_new, ThreadPool& pool) {
  if (num_new == 0) return;
  const std::lock_guard<std::mutex> one_writer(append_mutex_);
  const auto num_heads = static_cast<std::size_t>(num_kv_heads_);
  std::vector<std::vector<float>> centroids(num_heads);
  std::vector<Encoded> encoded(num_heads);
  pool.run(num_kv_heads_, [&](std::int64_t h) {
    const auto at = static_cast<std::size_t>(h);
    encoded[at].resize(num_new, head_dim_);
    centroids[at] = heads_[at].centroid;
    if (!centroids[at].empty()) return;
    // The mean of the first keys; a wrong one costs precision, never correctness.
    std::vector<float> weights(static_cast<std::size_t>(std::min<std::int64_t>(num_new, kChunkKeys)));
    std::fill(weights.begin(), weights.end(), 1.0f / static_cast<float>(weights.size()));
    centroids[at].assign(static_cast<std::size_t>(head_dim_), 0.0f);
    kernels().accumulate(weights.data(), 0, 1, heads[at], nullptr, 0, static_cast<int>(weights.size()),
                         centroids[at].data());
  });
  const std::int64_t tasks_per_head = (num_new + kEncodeKeys - 1) / kEncodeKeys;
  std::atomic<bool> is_finite{true};
  pool.run(num_kv_heads_ * tasks_per_head, [&](std::int64_t task) {
    const auto at = static_cast<std::size_t>(task / tasks_per_head);
    const std::int64_t first = task % tasks_per_head * kEncodeKeys;
    const std::int64_t count = std::min(kEncodeKeys, num_new - first);
    if (!encode(heads[at], centroids[at], first, count, encoded[at])) is_finite = false;
  });
  if (!is_finite) throw std::invalid_argument("keys hold NaN or infinity");
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  for (std::size_t h = 0; h < num_heads; ++h) {
    heads_[h].centroid = centroids[h];
    splice(heads_[h], encoded[h], num_new);
  }
  num_keys_ += num_new;
}

std::string LayerCodes::save() const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  std::string out(kMagic, sizeof(kMagic));
  const auto put = [&](const void* data, std::size_t size) { out.append(static_cast<const char*>(data), size); };
  const std::int64_t header[5] = {num_kv_heads_, head_dim_, bits_, static_cast<std::int64_t>(seed_), num_keys_};
  put(header, sizeof(header));
  const std::size_t plane_total = static_cast<std::size_t>(bits_) * kChunkGroups * static_cast<std::size_t>(plane_bytes(head_dim_));
  for (const HeadCodes& head : heads_) {
    if (num_keys_ > 0) put(head.centroid.data(), head.centroid.size() * sizeof(float));
    for (const auto& chunk : head.chunks) {
      put(chunk->planes.get(), plane_total);
      put(chunk->coarse, sizeof(chunk->coarse));
      put(chunk->fine, sizeof(chunk->fine));
      put(chunk->error, sizeof(chunk->error));
      put(&chunk->coarse_unit, sizeof(float));
    }
  }
  return out;
}

std::shared_ptr<LayerCodes> LayerCodes::load(const char* data, std::size_t size) {
  std::size_t at = 0;
  const auto take = [&](void* out, std::size_t bytes) {
    if (size - at < bytes) throw std::invalid_argument("truncated codes");
    std::memcpy(out, data + at, bytes);
    at += bytes;
  };
  char magic[sizeof(kMagic)];
  std::int64_t header[5];
  take(magic, sizeof(magic));
  if (std::memcmp(magic, kMagic, sizeof(kMagic)) != 0) throw std::invalid_argument("not codes of this version");
  take(header, sizeof(header));
  if (header[0] < 1 || header[0] > 4096 || header[1] < 8 || header[1] > kMaxHeadDim || header[2] < 1 ||
      header[2] > kMaxBits || header[4] < 0) {
    throw std::invalid_argument("damaged codes header");
  }
  auto codes = std::make_shared<LayerCodes>(static_cast<int>(header[0]), static_cast<int>(header[1]),
                                            static_cast<int>(header[2]), static_cast<std::uint64_t>(header[3]));
  const std::size_t plane_total =
      static_cast<std::size_t>(codes->bits_) * kChunkGroups * static_cast<std::size_t>(plane_bytes(codes->head_dim_));
  const std::int64_t num_chunks = (header[4] + kChunkKeys - 1) / kChunkKeys;
  for (HeadCodes& head : codes->heads_) {
    if (header[4] == 0) break;
    head.centroid.resize(static_cast<std::size_t>(codes->head_dim_));
    take(head.centroid.data(), head.centroid.size() * sizeof(float));
    for (std::int64_t c = 0; c < num_chunks; ++c) {
      if (size - at < plane_total) throw std::invalid_argument("truncated codes");
      auto chunk = std::make_unique<CodeChunk>();
      chunk->planes = allocate_aligned(plane_total);
      take(chunk->planes.get(), plane_total);
      take(chunk->coarse, sizeof(chunk->coarse));
      take(chunk->fine, sizeof(chunk->fine));
      take(chunk->error, sizeof(chunk->error));
      take(&chunk->coarse_unit, sizeof(float));
      head.chunks.push_back(std::move(chunk));
    }
  }
  if (at != size) throw std::invalid_argument("codes with bytes left over");
  codes->num_keys_ = header[4];
  return codes;
}

CodeQuery prepare_query(const LayerCodes& codes, int head, const Queries& queries, float deviations) {
  const int dims = codes.head_dim();
  const int tables = dims / 4;
  const auto table_bytes = static_cast<std::size_t>(queries.num) * static_cast<std::size_t>(tables) * 16;
  // Ratio of deviation to factor for a sign code: sqrt(1 - a^2), a = 0.8 give or take.
  constexpr float kSignError = 0.66f;
  CodeQuery out;
  out.coarse_tables.resize(table_bytes);
  out.fine_tables.resize(table_bytes);
  float offsets[kMaxGroup];
  float largest = 1.0f;
  for (int h = 0; h < queries.num; ++h) {
    float rotated[kMaxHeadDim];
    std::copy_n(queries.values + h * dims, dims, rotated);
    out.base[h] = dot(rotated, codes.head(head).centroid.data(), dims);
    codes.rotation().apply(rotated);
    out.norm[h] = std::sqrt(dot(rotated, rotated, dims));
    // Sums over the subsets of four coordinates, shifted to begin at zero.
    float range = 0.0f, absolute = 0.0f, total = 0.0f, lowest = 0.0f;
    for (int s = 0; s < tables; ++s) {
      float piece = 0.0f;
      for (int j = 4 * s; j < 4 * s + 4; ++j) {
        piece += std::fabs(rotated[j]);
        total += rotated[j];
        lowest += std::min(0.0f, rotated[j]);
      }
      range = std::max(range, piece);
      absolute += piece;
    }
    const float coarse = std::max(range / kCoarseLevels, 1e-30f), fine = std::max(range / kFineLevels, 1e-30f);
    for (int s = 0; s < tables; ++s) {
      const float* q = rotated + 4 * s;
      float low = 0.0f;
      for (int j = 0; j < 4; ++j) low += std::min(0.0f, q[j]);
      const auto at = (static_cast<std::size_t>(h) * static_cast<std::size_t>(tables) + static_cast<std::size_t>(s)) * 16;
      for (unsigned subset = 0; subset < 16; ++subset) {
        float sum = -low;
        for (unsigned j = 0; j < 4; ++j) sum += subset >> j & 1u ? q[j] : 0.0f;
        out.coarse_tables[at + subset] = static_cast<std::uint8_t>(sum / coarse + 0.5f);
        out.fine_tables[at + subset] = static_cast<std::uint8_t>(sum / fine + 0.5f);
      }
    }
    // <sign, q'> = 2 (lowest + coarse * sum) - total; rounding the tables adds its own deviation.
    const float rounding = 2.0f * coarse * std::sqrt(static_cast<float>(tables) / 12.0f);
    const float deviation = std::hypot(kSignError * out.norm[h], rounding);
    out.coarse_step[h] = 2.0f * coarse;
    offsets[h] = std::ceil((2.0f * lowest - total + deviations * deviation) / out.coarse_step[h]);
    const float top = static_cast<float>(tables * kCoarseLevels);
    largest = std::max({largest, std::fabs(offsets[h]), std::fabs(offsets[h] + top)});
    const int levels = 1 << codes.bits();
    out.fine_step[h] = 2.0f * fine;
    out.fine_offset[h] = static_cast<float>(levels - 1) * (2.0f * lowest - total);
  }
  while (out.shift < 14 && largest * static_cast<float>(2 << out.shift) <= 32767.0f) ++out.shift;
  for (int h = 0; h < queries.num; ++h) {
    // A bound too high for the integers is no bound at all: cut, the key scores below anything that matters.
    const float limit = 32767.0f - static_cast<float>(tables * kCoarseLevels);
    out.offsets[h] = static_cast<std::int16_t>(std::clamp(offsets[h], -limit, limit));
    out.coarse_step[h] /= static_cast<float>(1 << out.shift);
  }
  return out;
}

}  // namespace retrieval
