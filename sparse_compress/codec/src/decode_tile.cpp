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

Verdict DecodeEngine(const DecodeTable& table, const uint8_t* stream, size_t stored, uint8_t first,
                     uint8_t* raw, size_t size) {
  std::memset(raw, first, size);
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

}  // namespace

bool DecodeTile(DecodeTable* table, const uint8_t* stored, size_t stored_bytes, bool coded,
                uint8_t* tile, size_t tile_bytes, unzip_failure* failure) {
  uint8_t stream[kMaxEngine];
  uint8_t raw[kMaxEngine];
  uint8_t dictionary[kMaxDictionary];
  const size_t size = tile_bytes / kEngines;
  for (int engine = 0; engine < kEngines; ++engine) {
    Gather(stored, engine, stored_bytes / kEngines, kBlock, coded ? stream : raw);
    if (coded) {
      if (engine == 0) {
        ReadDictionary(stream, table->mode(), dictionary);
        table->Use(dictionary);
      }
      Verdict verdict = CheckHeader(stream, dictionary, size, table->mode());
      if (verdict.cause == 0) {
        verdict = DecodeEngine(*table, stream, stored_bytes / kEngines, dictionary[0], raw, size);
      }
      if (verdict.cause) {
        failure->engine = engine;
        failure->cause = verdict.cause;
        failure->value = verdict.value;
        return false;
      }
    }
    Scatter(raw, engine, size, kChunk, tile);
  }
  return true;
}

}  // namespace unzip
