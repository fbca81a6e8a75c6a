#include "encode.h"

namespace unzip {
namespace {

// How far an engine is.
struct Progress {
  uint32_t raw;
  uint32_t written;
};

// All bits from `used` (at most 63) on.
inline uint64_t Fill(unsigned used) { return ~uint64_t{0} << used; }

// A word on its way: its codes and, added to where its raw bytes start, the sums of its steps.
struct Word {
  uint64_t codes;
  uint32_t sums;

  uint32_t raw() const { return sums & 0xFFFF; }
  unsigned used() const { return sums >> EncodeStep::kLength; }

  void Add(const EncodeStep& step) {
    codes |= uint64_t{step.codes} << used();
    sums += step.sums;
  }

  // Adds a step if it fits; otherwise returns all ones. Its codes are there even then, as what
  // comes behind those that fit is filled. A branch would be mispredicted too often.
  uint32_t Try(const EncodeStep& step) {
    Add(step);
    const auto full = static_cast<uint32_t>(static_cast<int32_t>(sums) >> 31);
    sums -= step.sums & full;
    return full;
  }
};

// Codes a word of low mode in all lanes at once, so that the processor need not wait for any.
template <int kLanes>
inline void CodeWord(const EncodeTable& table, const Raw* raw, Stream* streams, uint32_t written,
                     Word* words) {
  for (int step = 0; step < 2; ++step) {  // of 24 bits at most
    for (int i = 0; i < kLanes; ++i) words[i].Add(table.Pair(raw[i] + words[i].raw()));
  }
  uint32_t full;
  do {
    full = ~uint32_t{0};
    for (int i = 0; i < kLanes; ++i) full &= words[i].Try(table.Pair(raw[i] + words[i].raw()));
  } while (!full);
  for (int i = 0; i < kLanes; ++i) {
    // The first byte of the pair that did not fit may do so alone; its code is there already.
    words[i].Try(EncodeStep{0, table.One(raw[i][words[i].raw()]).sums});
    StoreWord(streams[i] + written, words[i].codes | Fill(words[i].used()));
    words[i] = Word{0, words[i].raw()};
  }
}

// Codes words of low mode as long as every lane has enough raw bytes. All lanes have the same
// number of words.
template <int kLanes>
void CodeWords(const EncodeTable& table, const Raw* raw, size_t size, Stream* streams,
               Progress* progress) {
  constexpr uint32_t kMost = 42;  // raw bytes of a word: 21 codes of 2
  Word words[kLanes];
  uint32_t written = progress[0].written;
  for (int i = 0; i < kLanes; ++i) words[i] = Word{0, progress[i].raw};
  for (;;) {
    size_t left = size;
    for (const Word& word : words) left = std::min(left, size - word.raw());
    if (left < kMost + 2) break;
    for (size_t count = (left - 2) / kMost; count > 0; --count) {
      CodeWord<kLanes>(table, raw, streams, written, words);
      written += 8;
    }
  }
  for (int i = 0; i < kLanes; ++i) progress[i] = Progress{words[i].raw(), written};
}

size_t CountRun(const uint8_t* raw, uint8_t first, size_t most) {
  size_t run = 0;
  while (run < most && raw[run] == first) ++run;
  return run;
}

// Codes the rest of an engine in any mode.
void CodeRest(const EncodeTable& table, const uint8_t* raw, size_t size, uint8_t* stream,
              Progress* progress) {
  const uint8_t first = table.dictionary()[0];
  const size_t most = table.mode() == kLow ? 2 : kLongestRun;
  size_t at = progress->raw;
  uint8_t* out = stream + progress->written;
  for (bool ended = false; !ended; out += 8) {
    const size_t window = std::min(at + kWindow, size);
    uint64_t word = 0;
    unsigned used = 0;
    while (at < window) {
      const size_t run = CountRun(raw + at, first, std::min<size_t>(most, window - at));
      const unsigned bits = kWordBits - used;
      const Code& code = run ? table.Run(run, bits) : table.Single(raw[at]);
      if (code.length > bits) break;
      word |= static_cast<uint64_t>(code.bits) << used;
      used += code.length;
      at += code.taken;
    }
    ended = at == size && used + kEndLength <= kWordBits;
    if (ended) {
      word |= uint64_t{kEndBits} << used;
    } else if (at < window || at == size) {
      word |= Fill(used);
    }  // and zeros behind a whole window
    StoreWord(out, word);
  }
  progress->written = static_cast<uint32_t>(out - stream);
}

void WriteHeader(const EncodeTable& table, const uint8_t* raw, size_t size, uint8_t* stream) {
  const uint8_t* dictionary = table.dictionary();
  const Checksums sums = ChecksumsOf(raw, size);
  const int early = DictionarySize(table.mode()) - 34;
  stream[0] = static_cast<uint8_t>(table.mode());
  stream[1] = static_cast<uint8_t>(size / 128);
  stream[2] = early ? dictionary[0] : 0;
  stream[3] = early ? dictionary[1] : 0;
  stream[4] = sums.odd;
  stream[5] = sums.even;
  std::memcpy(stream + 6, dictionary + early, 34);
}

// Interleaves the streams of a tile, or its raw bytes if that is shorter; returns whether it is
// not.
bool LayOut(const Raw* raw, size_t size, Stream* streams, const Progress* progress, uint8_t* out,
            int64_t* stored) {
  size_t longest = 0;
  for (int i = 0; i < kEngines; ++i) longest = std::max<size_t>(longest, progress[i].written);
  const bool coded = longest <= size;
  longest = coded ? (longest + kBlock - 1) / kBlock * kBlock : size;
  for (int i = 0; i < kEngines; ++i) {
    const size_t written = progress[i].written;
    if (coded) std::memset(streams[i] + written, 0, longest - written);
    Scatter(coded ? streams[i] : raw[i], i, longest, kBlock, out);
  }
  *stored = static_cast<int64_t>(longest * kEngines);
  return coded;
}

// Codes `kTiles` tiles of the same size at once.
template <int kTiles>
void EncodeSome(const EncodeTable& table, const uint8_t* tiles, size_t tile_bytes,
                EncodeSpace* space, uint8_t* out, int64_t* stored, uint8_t* coded) {
  constexpr int kLanes = kTiles * kEngines;
  Raw* raw = space->raw;
  Stream* streams = space->streams;
  Progress progress[kLanes];
  const size_t size = tile_bytes / kEngines;
  for (int i = 0; i < kLanes; ++i) {
    Gather(tiles + i / kEngines * tile_bytes, i % kEngines, size, kChunk, raw[i]);
    WriteHeader(table, raw[i], size, streams[i]);
    progress[i] = Progress{0, kHeader};
  }
  if (table.mode() == kLow) CodeWords<kLanes>(table, raw, size, streams, progress);
  for (int i = 0; i < kLanes; ++i) {
    if (table.mode() == kLow) CodeWords<1>(table, &raw[i], size, &streams[i], &progress[i]);
    CodeRest(table, raw[i], size, streams[i], &progress[i]);
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    const int first = tile * kEngines;
    coded[tile] = LayOut(&raw[first], size, &streams[first], &progress[first], out, &stored[tile]);
    out += stored[tile];
  }
}

}  // namespace

int64_t EncodeTiles(const EncodeTable& table, const uint8_t* raw, const int64_t* tile_sizes,
                    int64_t tiles, EncodeSpace* space, uint8_t* out, int64_t* stored,
                    uint8_t* coded) {
  int64_t length = 0;
  for (int64_t tile = 0; tile < tiles;) {
    const auto size = static_cast<size_t>(tile_sizes[tile]);
    const bool two = tile + 1 < tiles && tile_sizes[tile + 1] == tile_sizes[tile];
    const auto encode = two ? EncodeSome<2> : EncodeSome<1>;
    encode(table, raw, size, space, out + length, stored + tile, coded + tile);
    for (const int64_t end = tile + 1 + two; tile < end; ++tile) {
      raw += size;
      length += stored[tile];
    }
  }
  return length;
}

}  // namespace unzip
