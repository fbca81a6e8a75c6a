#include "tile.h"

namespace unzip {
namespace {

// For every position, how many bytes from there on are `first`, up to the longest run.
void CountRuns(const uint8_t* raw, size_t size, uint8_t first, uint8_t* runs) {
  unsigned run = 0;
  for (size_t i = size; i-- > 0;) {
    run = std::min<unsigned>(run + 1, kLongestRun) & -static_cast<unsigned>(raw[i] == first);
    runs[i] = static_cast<uint8_t>(run);
  }
}

// Returns the bytes written to `stream`, or 0 when they would be more than `size`.
size_t EncodeEngine(const EncodeTable& table, const uint8_t* raw, size_t size, uint8_t* stream) {
  const uint8_t* dictionary = table.dictionary;
  const Checksums sums = ChecksumsOf(raw, size);
  const int early = DictionarySize(table.mode) - 34;
  stream[0] = static_cast<uint8_t>(table.mode);
  stream[1] = static_cast<uint8_t>(size / 128);
  stream[2] = early ? dictionary[0] : 0;
  stream[3] = early ? dictionary[1] : 0;
  stream[4] = sums.odd;
  stream[5] = sums.even;
  std::memcpy(stream + 6, dictionary + early, 34);

  uint8_t runs[kMaxEngine];
  CountRuns(raw, size, dictionary[0], runs);
  size_t written = kHeader;
  size_t at = 0;
  for (bool ended = false; !ended; written += 8) {
    if (written >= size) return 0;
    const size_t end = std::min(at + kWindow, size);
    uint64_t word = 0;
    unsigned used = 0;
    while (at < end) {
      // Branches on the data would be mispredicted half of the time: look up instead.
      const size_t run = std::min<size_t>(runs[at], end - at);
      const size_t take = table.take[used + 6 > kWordBits][run];
      const Code code = table.codes[take][raw[at]];
      if (used + code.length > kWordBits) break;
      word |= static_cast<uint64_t>(code.bits) << used;
      used += code.length;
      at += code.taken;
    }
    if (at == size && used + kEndLength <= kWordBits) {
      word |= static_cast<uint64_t>(kEndBits) << used;
      ended = true;
    } else if (at == size || at < end) {
      word |= ~uint64_t{0} << used;
    }
    StoreWord(stream + written, word);
  }
  return written;
}

}  // namespace

size_t EncodeTile(const EncodeTable& table, const uint8_t* tile, size_t tile_bytes, uint8_t* out,
                  uint8_t* coded) {
  uint8_t raw[kEngines][kMaxEngine];
  uint8_t streams[kEngines][kMaxEngine];
  size_t written[kEngines] = {};
  const size_t size = tile_bytes / kEngines;
  size_t longest = 0;
  *coded = 1;
  for (int engine = 0; engine < kEngines; ++engine) {
    Gather(tile, engine, size, kChunk, raw[engine]);
    if (*coded) written[engine] = EncodeEngine(table, raw[engine], size, streams[engine]);
    if (written[engine] == 0) *coded = 0;
    longest = std::max(longest, written[engine]);
  }
  longest = *coded ? (longest + kBlock - 1) / kBlock * kBlock : size;
  for (int engine = 0; engine < kEngines; ++engine) {
    if (*coded) std::memset(streams[engine] + written[engine], 0, longest - written[engine]);
    Scatter(*coded ? streams[engine] : raw[engine], engine, longest, kBlock, out);
  }
  return longest * kEngines;
}

}  // namespace unzip
