// Codes of a layer as bytes, and back.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "codes.h"

namespace retrieval {
namespace {

constexpr char kMagic[8] = {'R', 'B', 'Q', 'C', 'O', 'D', 'E', '9'};

}  // namespace

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
        put(groups->codes, groups->nbytes());
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
      if (size - at < static_cast<std::size_t>(head.shape.num_pieces() * kChunkKeys)) {
        throw std::invalid_argument("truncated codes");
      }
      codes->add_chunk(head);
      CodeChunk& chunk = head.chunks.back();
      for (CodeGroups* groups : {&chunk.keys, &chunk.means}) {
        take(groups->codes, groups->nbytes());
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
