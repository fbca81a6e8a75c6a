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
constexpr unsigned kLongestFill = 10;
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

// Little endian, whatever the host. Compilers do not always see through bytes one by one.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
inline uint64_t Swapped(uint64_t word) { return __builtin_bswap64(word); }
inline uint16_t Swapped(uint16_t pair) { return __builtin_bswap16(pair); }
#else
inline uint64_t Swapped(uint64_t word) { return word; }
inline uint16_t Swapped(uint16_t pair) { return pair; }
#endif

inline uint64_t LoadWord(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, 8);
  return Swapped(word);
}

inline void StoreWord(uint8_t* to, uint64_t word) {
  word = Swapped(word);
  std::memcpy(to, &word, 8);
}

// The first byte is the lower one.
inline unsigned LoadPair(const uint8_t* from) {
  uint16_t pair;
  std::memcpy(&pair, from, 2);
  return Swapped(pair);
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

// `size` is a multiple of 8.
inline Checksums ChecksumsOf(const uint8_t* raw, size_t size) {
  uint64_t all = 0;
  for (size_t i = 0; i < size; i += 8) {
    uint64_t word;
    std::memcpy(&word, raw + i, 8);
    all ^= word;
  }
  uint8_t bytes[8];
  std::memcpy(bytes, &all, 8);
  Checksums sums;
  for (int i = 0; i < 8; i += 2) {
    sums.even ^= bytes[i];
    sums.odd ^= bytes[i + 1];
  }
  return sums;
}

constexpr size_t kLongestRun = 9;
// Raw bytes and streams may be read and written so far past their end.
constexpr size_t kSlack = 128;

// Raw bytes of an engine.
using Raw = uint8_t[kMaxEngine + kSlack];

struct Entry {
  uint8_t length;
  uint8_t repeats;
  uint8_t byte;
};

// For the next 12 bits: the code they begin with; and, for words without surprises, all the codes
// that they hold. Rebuilt only when the dictionary changes.
class DecodeTable {
 public:
  // Raw bytes of a step; others behind these are the first of the dictionary, in high mode only.
  static constexpr unsigned kBytes = 6;
  static constexpr unsigned kMore = 8;
  // Two steps take 15 bits at least: the second begins with the code that was too long for the
  // first. A few words of high mode take more of them.
  static constexpr int kMostSteps = 9;
  static_assert(kMostSteps * (kBytes + kMore) <= kSlack, "bad words are written before refused");

  explicit DecodeTable(int mode);

  void Use(const uint8_t* dictionary);

  int mode() const { return mode_; }
  const Entry& operator[](uint64_t bits) const { return entries_[bits & 4095]; }

  // The codes that some bits begin with. From the lowest bit on: 8 bits, how many they are; the raw
  // bytes; 8 bits, the number of these. The bits are inverted, so that those behind a word are like
  // the ones that fill it: no codes. Nor has a step END, the unused code or the literal of 255.
  uint64_t Step(uint64_t inverse) const { return steps_[inverse & 4095]; }

  // The first byte of the dictionary, eight times.
  uint64_t run() const { return run_; }

 private:
  void Enter(Code code, uint8_t repeats, uint8_t byte);
  uint64_t Collect(uint64_t bits) const;

  int mode_;
  bool filled_ = false;
  uint8_t dictionary_[kMaxDictionary] = {};
  uint64_t run_ = 0;
  Entry entries_[4096];
  alignas(64) uint64_t steps_[4096];
};

// Returns whether the tile is good; otherwise *failure tells the engine and the cause.
// `stored_bytes` is a multiple of 128, at most `tile_bytes`, and at least 256 if coded; a tile that
// is not coded has `tile_bytes` of them.
bool DecodeTile(DecodeTable* table, const uint8_t* stored, size_t stored_bytes, bool coded,
                uint8_t* tile, size_t tile_bytes, unzip_failure* failure);

}  // namespace unzip

#endif  // SPARSE_COMPRESS_UNZIP_TILE_H_
