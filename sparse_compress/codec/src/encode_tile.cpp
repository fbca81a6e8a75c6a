#include "tile.h"

namespace unzip {
namespace {

// One engine's stream on its way. The part of `word` that is not used yet is all ones, as the
// format fills words, so a word that is full needs no more work.
struct Lane {
  const uint8_t* raw;
  const uint8_t* end;
  uint8_t* out;
  uint64_t word = ~uint64_t{0};
  unsigned used = 0;

  size_t left() const { return static_cast<size_t>(end - raw); }

  void Put(uint64_t inverse, unsigned length) {
    word ^= inverse << used;
    used += length;
  }

  void Next() {
    StoreWord(out, word);
    out += 8;
    word = ~uint64_t{0};
    used = 0;
  }

  void End() {
    if (used + kEndLength > kWordBits) Next();
    const uint64_t below = (uint64_t{1} << used) - 1;
    word = (word & below) | static_cast<uint64_t>(kEndBits) << used;
    Next();
  }
};

// Codes one or two bytes in low mode. There is no branch on the data: it would be mispredicted too
// often. A word never holds a whole window: 21 codes of 2 bytes are 42.
inline void Step(const EncodeTable& table, unsigned pair, Lane* lane) {
  uint16_t two;
  std::memcpy(&two, lane->raw, 2);
  const unsigned again = two == pair;
  const uint32_t code = table.Step(again << 8 | lane->raw[0]);
  lane->raw += 1 + again;
  // All ones if the word is full: compilers make branches of conditions.
  const int64_t room = static_cast<int64_t>(kWordBits) - lane->used - (code >> 16);
  const uint64_t full = static_cast<uint64_t>(room >> 63);
  StoreWord(lane->out, lane->word);
  lane->out += full & 8;
  lane->word |= full;
  lane->used &= static_cast<unsigned>(~full);
  lane->Put(code & 0xFFFF, code >> 16);
}

// Lanes are independent of each other, so the processor works on all of them at once.
template <int kLanes>
void CodeLow(const EncodeTable& table, Lane* lanes) {
  const unsigned pair = table.dictionary()[0] * 0x101u;
  Lane mine[kLanes];
  std::copy(lanes, lanes + kLanes, mine);
  for (;;) {
    size_t left = mine[0].left();
    for (int i = 1; i < kLanes; ++i) left = std::min(left, mine[i].left());
    if (left < 2) break;
    for (size_t step = 0; step < left / 2; ++step) {
      for (int i = 0; i < kLanes; ++i) Step(table, pair, &mine[i]);
    }
  }
  std::copy(mine, mine + kLanes, lanes);
}

size_t CountRun(const uint8_t* raw, uint8_t first) {
  size_t run = 0;
  while (run < kLongestRun && raw[run] == first) ++run;
  return run;
}

// Codes the rest of a lane in any mode.
void CodeRest(const EncodeTable& table, Lane* lane) {
  const uint8_t first = table.dictionary()[0];
  const size_t most = table.mode() == kLow ? 2 : kLongestRun;
  while (lane->left() > 0) {
    const uint8_t* window = lane->raw + std::min(kWindow, lane->left());
    while (lane->raw < window) {
      const size_t room = std::min<size_t>(most, window - lane->raw);
      const size_t run = std::min(CountRun(lane->raw, first), room);
      const unsigned bits = kWordBits - lane->used;
      const Code& code = run ? table.Run(run, bits) : table.Single(lane->raw[0]);
      if (code.length > bits) break;
      lane->Put(code.inverse, code.length);
      lane->raw += code.taken;
    }
    if (lane->left() == 0) break;
    // A word that holds a whole window is filled with zeros instead.
    if (lane->raw == window) lane->word &= (uint64_t{1} << lane->used) - 1;
    lane->Next();
  }
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

}  // namespace

size_t EncodeTile(const EncodeTable& table, const uint8_t* tile, size_t tile_bytes, uint8_t* out,
                  uint8_t* coded) {
  uint8_t raw[kEngines][kMaxEngine + kSlack];
  // A word takes 5 codes at least, so no stream is twice as long as its raw bytes.
  uint8_t streams[kEngines][2 * kMaxEngine + kSlack];
  const size_t size = tile_bytes / kEngines;
  Lane lanes[kEngines];
  for (int engine = 0; engine < kEngines; ++engine) {
    Gather(tile, engine, size, kChunk, raw[engine]);
    // A run ends with the raw bytes.
    std::memset(raw[engine] + size, ~table.dictionary()[0], kSlack);
    WriteHeader(table, raw[engine], size, streams[engine]);
    lanes[engine].raw = raw[engine];
    lanes[engine].end = raw[engine] + size;
    lanes[engine].out = streams[engine] + kHeader;
  }
  if (table.mode() == kLow) CodeLow<4>(table, lanes);
  size_t longest = 0;
  for (int engine = 0; engine < kEngines; ++engine) {
    CodeRest(table, &lanes[engine]);
    lanes[engine].End();
    longest = std::max(longest, static_cast<size_t>(lanes[engine].out - streams[engine]));
  }
  *coded = longest <= size;
  longest = *coded ? (longest + kBlock - 1) / kBlock * kBlock : size;
  for (int engine = 0; engine < kEngines; ++engine) {
    uint8_t* stream = streams[engine];
    const size_t written = lanes[engine].out - stream;
    if (*coded) std::memset(stream + written, 0, longest - written);
    Scatter(*coded ? stream : raw[engine], engine, longest, kBlock, out);
  }
  return longest * kEngines;
}

}  // namespace unzip
