#include "tile.h"

namespace unzip {
namespace {

using Stored = uint8_t[kMaxEngine];

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
    // Always as many: what is too much is written over, or behind the raw bytes.
    std::memset(raw + here, entry.byte, kLongestRun);
    here += entry.repeats;
  }
  *at = here;
  return Verdict{};
}

Verdict DecodeEngine(const DecodeTable& table, const uint8_t* stream, size_t stored, uint8_t* raw,
                     size_t size) {
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

// The four engines, a word of each at once. They are independent of each other, so the processor
// need not wait for any of them.
struct Lanes {
  uint64_t rest[kEngines];  // of the word, inverted: shifting it adds ones
  uint64_t used[kEngines];  // bits of it, in the lowest byte
  uint8_t* out[kEngines];

  bool busy() const { return (rest[0] | rest[1] | rest[2] | rest[3]) != 0; }

  template <bool kHighMode>
  void Advance(const DecodeTable& table) {
    for (int i = 0; i < kEngines; ++i) {
      const uint64_t step = table.Step(rest[i]);
      StoreWord(out[i], step >> 8);
      if (kHighMode) StoreWord(out[i] + DecodeTable::kBytes, table.run());
      out[i] += step >> 56;
      used[i] += step;
      rest[i] >>= step & 63;
    }
  }

  template <bool kHighMode>
  void Decode(const DecodeTable& table, const uint8_t* words) {
    constexpr int kSure = 7;  // hardly any group of words takes fewer
    for (int i = 0; i < kEngines; ++i) {
      rest[i] = ~LoadWord(words + i * kBlock);
      used[i] = 0;
    }
    for (int step = 0; step < DecodeTable::kMostSteps; ++step) {
      if (step >= kSure && !busy()) break;
      Advance<kHighMode>(table);
    }
  }

  // Whether there are codes that end before `limit`, and ones behind them.
  bool Filled(int i, const uint8_t* limit) const {
    const unsigned left = kWordBits - static_cast<unsigned>(used[i] & 0xFF);
    return rest[i] == 0 && left - 1 < kLongestFill && out[i] < limit;
  }
};

// Decodes the streams of a tile. Returns whether they are good; if not, DecodeEngine says why.
template <bool kHighMode>
bool DecodeEngines(const DecodeTable& table, const uint8_t* stored, size_t bytes, size_t size,
                   Raw* raw) {
  Lanes lanes;
  size_t at[kEngines] = {};
  bool ended[kEngines] = {};
  for (size_t read = kHeader; read < bytes; read += 8) {
    const uint8_t* words = stored + read / kBlock * kBlock * kEngines + read % kBlock;
    for (int i = 0; i < kEngines; ++i) lanes.out[i] = raw[i] + at[i];
    lanes.Decode<kHighMode>(table, words);
    for (int i = 0; i < kEngines; ++i) {
      // A word of low mode is too short for a window.
      const size_t limit = kHighMode ? std::min(size, at[i] + kWindow) : size;
      if (lanes.Filled(i, raw[i] + limit)) {
        at[i] = static_cast<size_t>(lanes.out[i] - raw[i]);
        continue;
      }
      const uint64_t word = LoadWord(words + i * kBlock);
      if (ended[i] ? word != 0 : DecodeWord(table, word, raw[i], size, &at[i], &ended[i]).cause) {
        return false;
      }
    }
  }
  bool good = true;
  for (int i = 0; i < kEngines; ++i) {
    const uint8_t* header = stored + i * kBlock;
    const Checksums sums = ChecksumsOf(raw[i], size);
    good &= ended[i] && sums.odd == header[4] && sums.even == header[5];
  }
  return good;
}

// Decodes one engine after the other. Returns false at the first that is not good.
bool DecodeInTurn(const DecodeTable& table, const Stored* streams, size_t stored,
                  const uint8_t* dictionary, size_t size, Raw* raw, unzip_failure* failure) {
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

bool GoodHeaders(const Stored* streams, const uint8_t* dictionary, size_t size, int mode) {
  for (int engine = 0; engine < kEngines; ++engine) {
    if (CheckHeader(streams[engine], dictionary, size, mode).cause) return false;
  }
  return true;
}

bool DecodeCoded(DecodeTable* table, const uint8_t* stored, size_t bytes, size_t size, Raw* raw,
                 unzip_failure* failure) {
  Stored streams[kEngines];
  const auto gather = [&](size_t count) {
    for (int i = 0; i < kEngines; ++i) Gather(stored, i, count, kBlock, streams[i]);
  };
  gather(2 * kBlock);  // the headers
  uint8_t dictionary[kMaxDictionary];
  ReadDictionary(streams[0], table->mode(), dictionary);
  table->Use(dictionary);
  const auto decode = table->mode() == kLow ? DecodeEngines<false> : DecodeEngines<true>;
  if (GoodHeaders(streams, dictionary, size, table->mode()) &&
      decode(*table, stored, bytes, size, raw)) {
    return true;
  }
  gather(bytes);
  return DecodeInTurn(*table, streams, bytes, dictionary, size, raw, failure);
}

}  // namespace

bool DecodeTile(DecodeTable* table, const uint8_t* stored, size_t stored_bytes, bool coded,
                uint8_t* tile, size_t tile_bytes, unzip_failure* failure) {
  Raw raw[kEngines];
  const size_t size = tile_bytes / kEngines, bytes = stored_bytes / kEngines;
  if (!coded) {
    for (int i = 0; i < kEngines; ++i) Gather(stored, i, bytes, kBlock, raw[i]);
  } else if (!DecodeCoded(table, stored, bytes, size, raw, failure)) {
    return false;
  }
  for (int i = 0; i < kEngines; ++i) Scatter(raw[i], i, size, kChunk, tile);
  return true;
}

}  // namespace unzip
