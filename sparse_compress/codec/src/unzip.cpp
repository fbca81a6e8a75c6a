#include "unzip.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "encode.h"

namespace unzip {
namespace {

bool GoodMode(int32_t mode) { return mode == kLow || mode == kHigh; }

bool GoodTile(int64_t bytes) {
  return bytes > 0 && bytes <= static_cast<int64_t>(kMaxTile) && bytes % kTileGrain == 0;
}

// Where every tile starts, and after them where the last one ends; empty if a size is bad.
std::vector<int64_t> Starts(const int64_t* tile_sizes, int64_t tiles) {
  std::vector<int64_t> starts(static_cast<size_t>(tiles) + 1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!GoodTile(tile_sizes[tile])) return {};
    starts[tile + 1] = starts[tile] + tile_sizes[tile];
  }
  return starts;
}

// Calls work(part, first, last) for `threads` ranges of tiles.
template <typename Work>
void Share(int64_t tiles, int64_t threads, const Work& work) {
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  int64_t part = 0;
  const auto bound = [&](int64_t i) { return tiles / threads * i + tiles % threads * i / threads; };
  try {
    for (; part + 1 < threads; ++part) {
      others.emplace_back(work, part, bound(part), bound(part + 1));
    }
  } catch (const std::exception&) {
    // No more threads: this one does the rest.
  }
  for (; part < threads; ++part) work(part, bound(part), bound(part + 1));
  for (std::thread& other : others) other.join();
}

int64_t ThreadsFor(int32_t threads, int64_t tiles) {
  return std::max<int64_t>(1, std::min<int64_t>({threads, tiles, 256}));
}

int32_t Encode(const uint8_t* stream, int64_t stream_bytes, const int64_t* tile_sizes,
               int64_t tiles, int32_t mode, const uint8_t* dictionary, int32_t threads,
               uint8_t* weight, int64_t* stored, uint8_t* coded) {
  if (tiles < 0 || !GoodMode(mode)) return UNZIP_BAD_ARGUMENT;
  const std::vector<int64_t> starts = Starts(tile_sizes, tiles);
  if (starts.empty() || starts[tiles] != stream_bytes) return UNZIP_BAD_ARGUMENT;
  const EncodeTable table(mode, dictionary);
  // A stored tile is never longer than the raw one: each part lays its tiles back to back from the
  // place of its input on, and then the parts close up.
  const int64_t parts = ThreadsFor(threads, tiles);
  std::vector<int64_t> begins(static_cast<size_t>(parts)), lengths(begins.size());
  const std::unique_ptr<EncodeSpace[]> spaces(new EncodeSpace[begins.size()]);
  Share(tiles, parts, [&](int64_t part, int64_t first, int64_t last) {
    begins[part] = starts[first];
    lengths[part] =
        EncodeTiles(table, stream + starts[first], tile_sizes + first, last - first, &spaces[part],
                    weight + begins[part], stored + first, coded + first);
  });
  int64_t end = 0;
  for (int64_t part = 0; part < parts; ++part) {
    std::memmove(weight + end, weight + begins[part], static_cast<size_t>(lengths[part]));
    end += lengths[part];
  }
  return UNZIP_OK;
}

bool GoodRecord(int64_t offset, int64_t stored, bool coded, int64_t tile_bytes,
                int64_t weight_bytes) {
  const int64_t least = coded ? static_cast<int64_t>(2 * kBlock * kEngines) : tile_bytes;
  return stored >= least && stored <= tile_bytes && stored % (kBlock * kEngines) == 0 &&
         offset >= 0 && offset <= weight_bytes - stored;
}

int32_t Decode(const uint8_t* weight, int64_t weight_bytes, const int64_t* offsets,
               const int64_t* stored, const uint8_t* coded, const int64_t* tile_sizes,
               int64_t tiles, int32_t mode, int32_t threads, uint8_t* stream, int64_t stream_bytes,
               unzip_failure* failure) {
  if (tiles < 0 || !GoodMode(mode)) return UNZIP_BAD_ARGUMENT;
  const std::vector<int64_t> starts = Starts(tile_sizes, tiles);
  if (starts.empty() || starts[tiles] != stream_bytes) return UNZIP_BAD_ARGUMENT;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!GoodRecord(offsets[tile], stored[tile], coded[tile] != 0, tile_sizes[tile],
                    weight_bytes)) {
      return UNZIP_BAD_ARGUMENT;
    }
  }
  const int64_t parts = ThreadsFor(threads, tiles);
  std::vector<unzip_failure> failures(static_cast<size_t>(parts), unzip_failure{});
  Share(tiles, parts, [&](int64_t part, int64_t first, int64_t last) {
    DecodeTable table(mode);
    for (int64_t tile = first; tile < last; ++tile) {
      if (!DecodeTile(&table, weight + offsets[tile], static_cast<size_t>(stored[tile]),
                      coded[tile] != 0, stream + starts[tile],
                      static_cast<size_t>(tile_sizes[tile]), &failures[part])) {
        failures[part].tile = tile;
        return;
      }
    }
  });
  for (const unzip_failure& found : failures) {
    if (found.cause) {
      *failure = found;
      return UNZIP_BAD_TILE;
    }
  }
  return UNZIP_OK;
}

// Adds the counts of at most 2^32 bytes.
void CountBytes(const uint8_t* stream, int64_t bytes, int64_t* counts) {
  // Several tables, so that equal bytes in a row need not wait for each other. Processors mistake
  // addresses for equal whose low bits are: the tables lie apart by other than a power of two.
  constexpr int kTables = 8;
  uint32_t tables[kTables][256 + 16] = {};
  int64_t i = 0;
  for (; i + kTables <= bytes; i += kTables) {
    for (int table = 0; table < kTables; ++table) ++tables[table][stream[i + table]];
  }
  for (; i < bytes; ++i) ++tables[0][stream[i]];
  for (const auto& table : tables) {
    for (int byte = 0; byte < 256; ++byte) counts[byte] += table[byte];
  }
}

}  // namespace
}  // namespace unzip

int32_t unzip_abi_version(void) { return 2; }

void unzip_count(const uint8_t* stream, int64_t stream_bytes, int64_t* counts) {
  constexpr int64_t kPart = int64_t{1} << 30;
  std::fill(counts, counts + 256, 0);
  for (int64_t i = 0; i < stream_bytes; i += kPart) {
    unzip::CountBytes(stream + i, std::min(kPart, stream_bytes - i), counts);
  }
}

int32_t unzip_encode(const uint8_t* stream, int64_t stream_bytes, const int64_t* tile_sizes,
                     int64_t tiles, int32_t mode, const uint8_t* dictionary, int32_t threads,
                     uint8_t* weight, int64_t* stored, uint8_t* coded) {
  try {
    return unzip::Encode(stream, stream_bytes, tile_sizes, tiles, mode, dictionary, threads, weight,
                         stored, coded);
  } catch (const std::exception&) {
    return UNZIP_NO_MEMORY;
  }
}

int32_t unzip_decode(const uint8_t* weight, int64_t weight_bytes, const int64_t* offsets,
                     const int64_t* stored, const uint8_t* coded, const int64_t* tile_sizes,
                     int64_t tiles, int32_t mode, int32_t threads, uint8_t* stream,
                     int64_t stream_bytes, unzip_failure* failure) {
  try {
    return unzip::Decode(weight, weight_bytes, offsets, stored, coded, tile_sizes, tiles, mode,
                         threads, stream, stream_bytes, failure);
  } catch (const std::exception&) {
    return UNZIP_NO_MEMORY;
  }
}
