// What coding and decoding share: the numbers of the format, its prefix code, its permutations.
#ifndef SPARSE_COMPRESS_UNZIP_TILE_H_
#define SPARSE_COMPRESS_UNZIP_TILE_H_

#include <algorithm>
#include <cstring>

#include "unzip.h"

namespace unzip {

constexpr int kEngines = 4;
constexpr size_t kTileGrain = 512;
constexpr size_t kMaxTile = 32768;
constexpr size_t kMaxEngine = kMaxTile / kEngines;
constexpr size_t kChunk = 64;
constexpr size_t kBlock = 32;
constexpr size_t kHeader = 40;
constexpr size_t kWindow = 64;
constexpr unsigned kWordBits = 64;
constexpr unsigned kEndLength = 9;
constexpr unsigned kEndBits = 0b111110111;  // 111011111, first bit lowest
constexpr int kLow = 0xA8;
constexpr int kHigh = 0x88;
constexpr int kMaxDictionary = 36;
constexpr int kCodewords = 38;
constexpr uint8_t kEnd = 0;
constexpr uint8_t kUnused = 255;

inline int DictionarySize(int mode) { return mode == kLow ? 36 : 34; }

struct Code {
  uint16_t bits = 0;
  uint8_t length = 0;
  uint8_t taken = 1;  // raw bytes that it codes
};

// The first bit of a code word is written first, so it becomes the lowest one.
inline Code Reversed(unsigned bits, unsigned length) {
  Code code;
  code.length = static_cast<uint8_t>(length);
  for (unsigned i = 0; i < length; ++i) {
    code.bits = static_cast<uint16_t>(code.bits << 1 | ((bits >> i) & 1));
  }
  return code;
}

inline Code Codeword(int number) {
  if (number < 5) return Reversed(number, 3);                      // 000 .. 100
  if (number < 13) return Reversed(0b101000 + number - 5, 6);      // 101 xxx
  if (number < 21) return Reversed(0b110000 + number - 13, 6);     // 110 xxx
  if (number < 23) return Reversed(0b111000 + number - 21, 6);     // 111 00x
  if (number < 31) return Reversed(0b111010000 + number - 23, 9);  // 111 010 xxx
  return Reversed(0b111011000 + number - 31, 9);                   // 111 011 000 .. 110
}

inline Code Literal(unsigned byte) { return Reversed(0b1111u << 8 | byte, 12); }

// What a code word stands for: a run of the first byte, or one byte of the dictionary.
struct Meaning {
  uint8_t repeats;
  uint8_t rank;
};

inline Meaning MeaningOf(int mode, int number) {
  const auto rank = [](int value) { return Meaning{1, static_cast<uint8_t>(value)}; };
  if (mode == kLow) {
    if (number < 2) return Meaning{static_cast<uint8_t>(number + 1), 0};
    return number == kCodewords - 1 ? Meaning{kUnused, 0} : rank(number - 1);
  }
  if (number < 4) return Meaning{static_cast<uint8_t>(number + 1), 0};
  if (number == 5) return Meaning{9, 0};
  return number == 4 ? rank(1) : rank(number - 4);
}

inline uint64_t LoadWord(const uint8_t* from) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(from[i]) << (8 * i);
  return word;
}

inline void StoreWord(uint8_t* to, uint64_t word) {
  for (int i = 0; i < 8; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
}

// Copies every fourth piece of `bytes` bytes, from engine `engine` on.
inline void Gather(const uint8_t* from, int engine, size_t bytes, size_t piece, uint8_t* to) {
  for (size_t at = 0; at < bytes; at += piece) {
    std::memcpy(to + at, from + at * kEngines + engine * piece, piece);
  }
}

inline void Scatter(const uint8_t* from, int engine, size_t bytes, size_t piece, uint8_t* to) {
  for (size_t at = 0; at < bytes; at += piece) {
    std::memcpy(to + at * kEngines + engine * piece, from + at, piece);
  }
}

struct Checksums {
  uint8_t odd = 0;
  uint8_t even = 0;
};

inline Checksums ChecksumsOf(const uint8_t* raw, size_t size) {
  Checksums sums;
  for (size_t i = 0; i < size; i += 2) {
    sums.even ^= raw[i];
    sums.odd ^= raw[i + 1];
  }
  return sums;
}

constexpr int kLongestRun = 9;

struct EncodeTable {
  int mode;
  const uint8_t* dictionary;
  // Codes by run length and byte; the byte is the first one of the dictionary if it is a run.
  Code codes[kLongestRun + 1][256];
  // How many bytes to code at once when that many are the first byte: in a word with room for
  // any run, and in one with room for 3 bits only.
  uint8_t take[2][kLongestRun + 1] = {};

  EncodeTable(int mode, const uint8_t* dictionary) : mode(mode), dictionary(dictionary) {
    for (unsigned byte = 0; byte < 256; ++byte) codes[0][byte] = Literal(byte);
    for (int number = 0; number < kCodewords; ++number) {
      const Meaning meaning = MeaningOf(mode, number);
      if (meaning.repeats == kUnused) continue;
      if (meaning.rank == 0) {
        EnterRun(meaning.repeats, Codeword(number));
      } else {
        codes[0][dictionary[meaning.rank]] = Codeword(number);
      }
    }
  }

  void EnterRun(uint8_t repeats, Code code) {
    code.taken = repeats;
    codes[repeats][dictionary[0]] = code;
    for (int run = repeats; run <= kLongestRun; ++run) {
      take[0][run] = std::max(take[0][run], repeats);
      if (code.length == 3) take[1][run] = std::max(take[1][run], repeats);
    }
  }
};

// Returns the stored bytes: fewer than, or as many as, those of the tile.
size_t EncodeTile(const EncodeTable& table, const uint8_t* tile, size_t tile_bytes, uint8_t* out,
                  uint8_t* coded);

struct Entry {
  uint8_t length;
  uint8_t repeats;
  uint8_t byte;
};

// For the next 12 bits: the code they begin with. Rebuilt only when the dictionary changes.
class DecodeTable {
 public:
  explicit DecodeTable(int mode) : mode_(mode) {
    Enter(Reversed(0b111011111, kEndLength), kEnd, 0);
    for (unsigned byte = 0; byte < 256; ++byte) {
      Enter(Literal(byte), 1, static_cast<uint8_t>(byte));
    }
  }

  void Use(const uint8_t* dictionary) {
    const size_t size = DictionarySize(mode_);
    if (filled_ && std::memcmp(dictionary_, dictionary, size) == 0) return;
    std::memcpy(dictionary_, dictionary, size);
    filled_ = true;
    for (int number = 0; number < kCodewords; ++number) {
      const Meaning meaning = MeaningOf(mode_, number);
      Enter(Codeword(number), meaning.repeats, dictionary[meaning.rank]);
    }
  }

  int mode() const { return mode_; }
  const Entry& operator[](uint64_t bits) const { return entries_[bits & 4095]; }

 private:
  void Enter(Code code, uint8_t repeats, uint8_t byte) {
    for (unsigned bits = code.bits; bits < 4096; bits += 1u << code.length) {
      entries_[bits] = Entry{code.length, repeats, byte};
    }
  }

  int mode_;
  bool filled_ = false;
  uint8_t dictionary_[kMaxDictionary] = {};
  Entry entries_[4096];
};

// Returns whether the tile is good; otherwise *failure tells the engine and the cause.
// `stored_bytes` is a multiple of 128, at most `tile_bytes`, and at least 256 if coded; a tile that
// is not coded has `tile_bytes` of them.
bool DecodeTile(DecodeTable* table, const uint8_t* stored, size_t stored_bytes, bool coded,
                uint8_t* tile, size_t tile_bytes, unzip_failure* failure);

}  // namespace unzip

#endif  // SPARSE_COMPRESS_UNZIP_TILE_H_
