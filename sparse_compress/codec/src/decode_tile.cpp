#include "tile.h"

namespace unzip {
namespace {

struct Verdict {
  int cause = 0;
  int64_t value = 0;
};

Verdict Refuse(int cause, size_t value) { return Verdict{cause, static_cast<int64_t>(value)}; }

void ReadDictionary(const uint8_t* stream, int mode, uint8_t* dictionary) {
  const int early = DictionarySize(mode) - 34;
  std::memcpy(dictionary, stream + 2, early);
  std::memcpy(dictionary + early, stream + 6, 34);
}

Verdict CheckHeader(const uint8_t* stream, const uint8_t* first, size_t size, int mode) {
  if (stream[0] != kLow && stream[0] != kHigh) return Refuse(UNZIP_UNKNOWN_MODE, stream[0]);
  if (stream[0] != mode) return Refuse(UNZIP_OTHER_MODE, stream[0]);
  if (stream[1] * size_t{128} != size) return Refuse(UNZIP_WRONG_LENGTH, stream[1]);
  const unsigned reserved = stream[2] << 8 | stream[3];
  if (mode == kHigh && reserved != 0) return Refuse(UNZIP_RESERVED_HEADER, reserved);
  uint8_t dictionary[kMaxDictionary];
  ReadDictionary(stream, mode, dictionary);
  for (int rank = 0; rank < DictionarySize(mode); ++rank) {
    if (dictionary[rank] != first[rank]) return Refuse(UNZIP_DICTIONARY_DIFFERS, rank);
  }
  return Verdict{};
}

// Decodes one word into raw[*at ..size). Sets *ended once END is met.
Verdict DecodeWord(const DecodeTable& table, uint64_t rest, uint8_t* raw, size_t size, size_t* at,
                   bool* ended) {
  size_t here = *at;
  const size_t window = here + kWindow;
  const auto stop = [&](int cause) {
    *at = here;
    return Refuse(cause, here);
  };
  for (unsigned left = kWordBits;;) {
    if (here == window && here < size) {
      if (rest != 0) return stop(UNZIP_PADDING);
      break;
    }
    if (left <= 10 && rest == (uint64_t{1} << left) - 1) {
      // END would have fitted: after the last byte only it may follow.
      if (here == size && left >= kEndLength) return stop(UNZIP_MISSING_END);
      break;
    }
    const Entry entry = table[rest];
    if (entry.length > left) return stop(UNZIP_STRADDLE);
    if (entry.repeats == kUnused) return stop(UNZIP_UNUSED_CODE);
    rest >>= entry.length;
    left -= entry.length;
    if (entry.repeats == kEnd) {
      if (here < size) return stop(UNZIP_EARLY_END);
      if (rest != 0) return stop(UNZIP_PADDING);
      *ended = true;
      break;
    }
    if (entry.repeats > size - here) return stop(UNZIP_PAST_LENGTH);
    if (entry.repeats > window - here) return stop(UNZIP_PAST_WINDOW);
    // A run is in place already: `raw` starts out full of the first byte.
    raw[here] = entry.byte;
    here += entry.repeats;
  }
  *at = here;
  return Verdict{};
}

Verdict DecodeEngine(const DecodeTable& table, const uint8_t* stream, size_t stored, uint8_t* raw,
                     size_t size) {
  std::memset(raw, table.first(), size);
  size_t at = 0;
  bool ended = false;
  for (size_t read = kHeader; read < stored; read += 8) {
    const uint64_t word = LoadWord(stream + read);
    if (ended) {
      if (word != 0) return Refuse(UNZIP_PADDING, at);
      continue;
    }
    const Verdict verdict = DecodeWord(table, word, raw, size, &at, &ended);
    if (verdict.cause) return verdict;
  }
  if (!ended) return Refuse(UNZIP_MISSING_END, at);
  const Checksums sums = ChecksumsOf(raw, size);
  if (sums.odd != stream[4] || sums.even != stream[5]) {
    return Refuse(UNZIP_CHECKSUM, sums.odd << 8 | sums.even);
  }
  return Verdict{};
}

constexpr uint64_t kBytesMask = (uint64_t{1} << 48) - 1;
constexpr int kSureSteps = 5;  // 4 steps leave 16 bits at least
constexpr int kMoreSteps = 4;

// One engine's word while it is decoded several codes at a time.
struct Lane {
  uint64_t rest;
  unsigned left;
  uint8_t* out;

  // `out` has room beyond: what is written there again is the first byte of the dictionary.
  void Take(const DecodeTable& table, uint64_t codes) {
    StoreWord(out, (codes & kBytesMask) | table.padding());
    out += codes >> 48 & 0xFF;
    rest >>= codes >> 56;
    left -= codes >> 56;
  }
};

// Decodes one word of every engine at once, so that the processor need not wait for any of them.
// Returns false, as if nothing had been done, for a word that the raw bytes end with, that fills
// a window, or that is not as it should be.
bool DecodeWords(const DecodeTable& table, const uint8_t* const* words, uint8_t* const* raw,
                 size_t size, size_t* at) {
  Lane lanes[kEngines];
  for (int i = 0; i < kEngines; ++i) lanes[i] = Lane{LoadWord(words[i]), kWordBits, raw[i] + at[i]};
  for (int step = 0; step < kSureSteps; ++step) {
    for (Lane& lane : lanes) lane.Take(table, table.Many(lane.rest));
  }
  const uint64_t idle = table.padding() >> 48 | table.padding() >> 32 | table.padding() >> 16;
  for (int step = 0; step < kMoreSteps; ++step) {
    for (Lane& lane : lanes) {
      // All ones while more than the last bits are left: a branch would be mispredicted.
      const auto more = static_cast<uint64_t>(
          (static_cast<int64_t>(DecodeTable::kLast) - static_cast<int64_t>(lane.left)) >> 63);
      lane.Take(table, (table.Many(lane.rest) & more) | (idle & ~more));
    }
  }
  bool good = true;
  for (const Lane& lane : lanes) good &= lane.left <= DecodeTable::kLast;
  if (good) {
    for (int i = 0; i < kEngines; ++i) {
      const uint64_t codes = table.Last(lanes[i].rest, lanes[i].left);
      StoreWord(lanes[i].out, (codes & kBytesMask) | table.padding());
      lanes[i].out += codes >> 48 & 0xFF;
      const size_t end = static_cast<size_t>(lanes[i].out - raw[i]);
      good &= codes >> 56 == 1 && end < size && end < at[i] + kWindow;
    }
  }
  for (int i = 0; i < kEngines; ++i) {
    if (good) {
      at[i] = static_cast<size_t>(lanes[i].out - raw[i]);
    } else {
      std::memset(raw[i] + at[i], table.first(), kSlack);
    }
  }
  return good;
}

// Decodes the streams of a tile. Returns whether they are good; if not, DecodeEngine says why.
bool DecodeEngines(const DecodeTable& table, const uint8_t* const* streams, size_t stored,
                   uint8_t* const* raw, size_t size) {
  size_t at[kEngines] = {};
  bool ended[kEngines] = {};
  bool any_ended = false;
  for (int i = 0; i < kEngines; ++i) std::memset(raw[i], table.first(), size + kSlack);
  for (size_t read = kHeader; read < stored; read += 8) {
    const uint8_t* words[kEngines];
    for (int i = 0; i < kEngines; ++i) words[i] = streams[i] + read;
    if (!any_ended && DecodeWords(table, words, raw, size, at)) continue;
    for (int i = 0; i < kEngines; ++i) {
      const uint64_t word = LoadWord(words[i]);
      if (ended[i] ? word != 0 : DecodeWord(table, word, raw[i], size, &at[i], &ended[i]).cause) {
        return false;
      }
      any_ended |= ended[i];
    }
  }
  bool good = true;
  for (int i = 0; i < kEngines; ++i) {
    const Checksums sums = ChecksumsOf(raw[i], size);
    good &= ended[i] && sums.odd == streams[i][4] && sums.even == streams[i][5];
  }
  return good;
}

// Decodes one engine after the other. Returns false at the first that is not good.
bool DecodeInTurn(const DecodeTable& table, const uint8_t* const* streams, size_t stored,
                  const uint8_t* dictionary, uint8_t* const* raw, size_t size,
                  unzip_failure* failure) {
  for (int engine = 0; engine < kEngines; ++engine) {
    Verdict verdict = CheckHeader(streams[engine], dictionary, size, table.mode());
    if (verdict.cause == 0) {
      verdict = DecodeEngine(table, streams[engine], stored, raw[engine], size);
    }
    if (verdict.cause) {
      failure->engine = engine;
      failure->cause = verdict.cause;
      failure->value = verdict.value;
      return false;
    }
  }
  return true;
}

bool GoodHeaders(const uint8_t* const* streams, const uint8_t* dictionary, size_t size, int mode) {
  for (int engine = 0; engine < kEngines; ++engine) {
    if (CheckHeader(streams[engine], dictionary, size, mode).cause) return false;
  }
  return true;
}

}  // namespace

bool DecodeTile(DecodeTable* table, const uint8_t* stored, size_t stored_bytes, bool coded,
                uint8_t* tile, size_t tile_bytes, unzip_failure* failure) {
  uint8_t stream_space[kEngines][kMaxEngine];
  uint8_t raw_space[kEngines][kMaxEngine + kSlack];
  const uint8_t* streams[kEngines];
  uint8_t* raw[kEngines];
  const size_t size = tile_bytes / kEngines, bytes = stored_bytes / kEngines;
  for (int engine = 0; engine < kEngines; ++engine) {
    streams[engine] = stream_space[engine];
    raw[engine] = raw_space[engine];
    Gather(stored, engine, bytes, kBlock, coded ? stream_space[engine] : raw_space[engine]);
  }
  if (coded) {
    uint8_t dictionary[kMaxDictionary];
    ReadDictionary(streams[0], table->mode(), dictionary);
    table->Use(dictionary);
    const bool good = GoodHeaders(streams, dictionary, size, table->mode()) &&
                      DecodeEngines(*table, streams, bytes, raw, size);
    if (!good && !DecodeInTurn(*table, streams, bytes, dictionary, raw, size, failure))
      return false;
  }
  for (int engine = 0; engine < kEngines; ++engine)
    Scatter(raw[engine], engine, size, kChunk, tile);
  return true;
}

}  // namespace unzip
