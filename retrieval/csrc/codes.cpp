#include "codes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>

#include <sys/mman.h>
#include <unistd.h>

#include "rotation.h"
#include "summary.h"

namespace retrieval {
namespace {

constexpr char kMagic[8] = {'R', 'B', 'Q', 'C', 'O', 'D', 'E', '8'};
constexpr std::int16_t kLeastLargest = 4096;  // largest factor of a chunk, below which its unit is too coarse for the next
constexpr std::size_t kMeansTogether = 8;  // chunks
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

Pages::Pages(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  bytes_ = (bytes + page - 1) / page * page;
  void* pointer = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pointer == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(pointer);
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

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
    : num_kv_heads_(num_kv_heads), head_dim_(head_dim), bits_(bits), seed_(seed) {
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
  for (const auto* kind : {&key_pages_, &mean_pages_}) {
    for (const Pages& pages : *kind) total += static_cast<std::int64_t>(pages.bytes());
  }
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
  const auto page = static_cast<double>(sysconf(_SC_PAGESIZE));
  const auto bytes_of = [&](int num_groups, CodeShape shape) {
    CodeGroups groups;
    groups.num_groups = num_groups;
    groups.shape = shape;
    return heads * static_cast<double>(groups.nbytes());
  };
  const CodeShape whole{head_dim, bits};
  const double keys = bytes_of(kChunkGroups, whole) + page;
  const double means = bytes_of(1, whole.of_means()) + page / kMeansTogether;
  const double chunk = keys + means + heads * sizeof(CodeChunk);
  // Maps and the two moments of what is not coded are a stretched head's.
  const double fixed = heads * sizeof(float) * (dims * (1.0 + kRunKeys) + (is_stretched ? 5.0 : 1.0) * dims * dims);
  // The last chunk may hold one key, and so may the last pages of means.
  return static_cast<std::int64_t>(fixed + kMeansTogether * means + (static_cast<double>(num_keys) / kChunkKeys + 1.0) * chunk);
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
  chunk.keys.num_groups = kChunkGroups;
  chunk.keys.shape = head.shape;
  chunk.means.num_groups = 1;
  chunk.means.shape = head.shape.of_means();
  // Means of some chunks lie together, since a search reads them in a row.
  const auto place = [&](CodeGroups& groups, std::vector<Pages>& pages, std::size_t together) {
    std::size_t before = 0, total = 0;  // bytes of a chunk of the heads before, and of all
    for (const HeadCodes& each : heads_) {
      CodeGroups like = groups;
      like.shape = &groups == &chunk.keys ? each.shape : each.shape.of_means();
      before += &each < &head ? like.nbytes() : 0;
      total += like.nbytes();
    }
    if (at / together == pages.size()) pages.emplace_back(together * total);
    groups.planes = pages[at / together].data() + together * before + at % together * groups.nbytes();
    groups.factors = reinterpret_cast<std::int16_t*>(groups.planes + groups.plane_total());
  };
  place(chunk.keys, key_pages_, 1);
  place(chunk.means, mean_pages_, kMeansTogether);
}

void CodeGroups::follow(const CodeGroups& before) {
  const std::int16_t largest = *std::max_element(before.factors, before.factors + before.num_factors());
  unit = largest >= kLeastLargest ? before.unit : 1.25f * before.unit * static_cast<float>(largest) / 32768.0f;
}

void CodeGroups::put(int slot, const std::uint8_t* code, float factor) {
  for (int p = 0; p < shape.bits; ++p) {
    auto* plane = reinterpret_cast<std::uint8_t*>(planes) +
                  (slot / kGroupKeys * shape.bits + p) * plane_bytes(shape.dims) + byte_of(slot % kGroupKeys);
    const int shift = shape.bits - 1 - p;
    for (int s = 0; s < shape.dims / 8; ++s) {
      unsigned packed = 0;
      for (int b = 0; b < 8; ++b) packed |= ((code[s * 8 + b] >> shift) & 1u) << b;
      plane[s * kGroupKeys] = static_cast<std::uint8_t>(packed);
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

std::string LayerCodes::save() const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  std::string out(kMagic, sizeof(kMagic));
  const auto put = [&](const void* data, std::size_t size) {
    if (size > 0) out.append(static_cast<const char*>(data), size);
  };
  const std::int64_t header[6] = {num_kv_heads_, head_dim_, bits_, static_cast<std::int64_t>(seed_), num_keys_,
                                  is_stretched()};
  put(header, sizeof(header));
  if (is_stretched()) put(maps_->data(), maps_->size() * sizeof(float));
  for (const HeadCodes& head : heads_) put(&head.shape, sizeof(head.shape));
  for (const HeadCodes& head : heads_) {
    if (num_keys_ > 0) {
      put(head.centroid.data(), head.centroid.size() * sizeof(float));
      put(head.pending.data(), head.pending.size() * sizeof(float));
      put(&head.num_scattered, sizeof(head.num_scattered));
      put(head.scatter.data(), head.scatter.size() * sizeof(float));
      for (const Uncoded* uncoded : {&head.keys, &head.means}) {
        put(uncoded->moment.data(), uncoded->moment.size() * sizeof(float));
        put(&uncoded->factors, sizeof(uncoded->factors));
      }
    }
    for (const CodeChunk& chunk : head.chunks) {
      for (const CodeGroups* groups : {&chunk.keys, &chunk.means}) {
        put(groups->planes, groups->nbytes());
        put(&groups->unit, sizeof(float));
      }
      put(chunk.radii, sizeof(chunk.radii));
      put(&chunk.radius_unit, sizeof(float));
    }
  }
  return out;
}

std::shared_ptr<LayerCodes> LayerCodes::load(const char* data, std::size_t size) {
  std::size_t at = 0;
  const auto take = [&](void* out, std::size_t bytes) {
    if (size - at < bytes) throw std::invalid_argument("truncated codes");
    if (bytes > 0) std::memcpy(out, data + at, bytes);
    at += bytes;
  };
  char magic[sizeof(kMagic)];
  std::int64_t header[6];
  take(magic, sizeof(magic));
  if (std::memcmp(magic, kMagic, sizeof(kMagic)) != 0) throw std::invalid_argument("not codes of this version");
  take(header, sizeof(header));
  if (header[0] < 1 || header[0] > 4096 || header[1] < 8 || header[1] > kMaxHeadDim || header[2] < 1 ||
      header[2] > kMaxBits || header[4] < 0 || header[5] < 0 || header[5] > 1) {
    throw std::invalid_argument("damaged codes header");
  }
  auto codes = std::make_shared<LayerCodes>(static_cast<int>(header[0]), static_cast<int>(header[1]),
                                            static_cast<int>(header[2]), static_cast<std::uint64_t>(header[3]));
  if (header[5] == 1) {
    const std::size_t num_maps = 2 * codes->heads_.size() * codes->matrix_size();
    if (size - at < num_maps * sizeof(float)) throw std::invalid_argument("truncated codes");
    std::vector<float> maps(num_maps);
    take(maps.data(), num_maps * sizeof(float));
    codes->maps_ = std::make_shared<const std::vector<float>>(std::move(maps));
  }
  const std::int64_t num_chunks = (header[4] + kChunkKeys - 1) / kChunkKeys;
  std::vector<CodeShape> shapes(codes->heads_.size());
  take(shapes.data(), shapes.size() * sizeof(CodeShape));
  for (std::size_t h = 0; h < shapes.size(); ++h) codes->set_shape(codes->heads_[h], shapes[h]);
  for (HeadCodes& head : codes->heads_) {
    if (header[4] == 0) break;
    head.centroid.resize(static_cast<std::size_t>(codes->head_dim_));
    take(head.centroid.data(), head.centroid.size() * sizeof(float));
    head.pending.resize(static_cast<std::size_t>(header[4] % kRunKeys * codes->head_dim_));
    take(head.pending.data(), head.pending.size() * sizeof(float));
    take(&head.num_scattered, sizeof(head.num_scattered));
    if (head.num_scattered != header[4] / kRunKeys) throw std::invalid_argument("damaged codes");
    head.scatter.resize(head.num_scattered > 0 ? codes->matrix_size() : 0);
    take(head.scatter.data(), head.scatter.size() * sizeof(float));
    const auto num_uncoded = static_cast<std::size_t>(codes->head_dim_ - head.shape.dims);
    for (Uncoded* uncoded : {&head.keys, &head.means}) {
      uncoded->moment.resize(head.num_scattered > 0 ? num_uncoded * num_uncoded : 0);
      take(uncoded->moment.data(), uncoded->moment.size() * sizeof(float));
      take(&uncoded->factors, sizeof(uncoded->factors));
    }
    for (std::int64_t c = 0; c < num_chunks; ++c) {
      if (size - at < static_cast<std::size_t>(head.shape.bits * kChunkGroups * plane_bytes(head.shape.dims))) {
        throw std::invalid_argument("truncated codes");
      }
      codes->add_chunk(head);
      CodeChunk& chunk = head.chunks.back();
      for (CodeGroups* groups : {&chunk.keys, &chunk.means}) {
        take(groups->planes, groups->nbytes());
        take(&groups->unit, sizeof(float));
      }
      take(chunk.radii, sizeof(chunk.radii));
      take(&chunk.radius_unit, sizeof(float));
      const std::int64_t num_full = std::min<std::int64_t>(kChunkRuns, header[4] / kRunKeys - c * kChunkRuns);
      chunk.full_runs = num_full <= 0 ? 0 : ~std::uint64_t{0} >> (kChunkRuns - num_full);
    }
  }
  if (at != size) throw std::invalid_argument("codes with bytes left over");
  codes->num_keys_ = header[4];
  return codes;
}

}  // namespace retrieval
