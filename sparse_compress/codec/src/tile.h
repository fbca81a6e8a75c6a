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
  uint16_t inverse = 0;  // as many bits, each the other way
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
  code.inverse = static_cast<uint16_t>(~code.bits & ((1u << length) - 1));
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

// Little endian, whatever the host; compilers make one instruction of it.
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

class EncodeTable {
 public:
  EncodeTable(int mode, const uint8_t* dictionary) : mode_(mode), dictionary_(dictionary) {
    for (unsigned byte = 0; byte < 256; ++byte) singles_[byte] = Literal(byte);
    for (int number = 0; number < kCodewords; ++number) {
      const Meaning meaning = MeaningOf(mode, number);
      if (meaning.repeats == kUnused) continue;
      if (meaning.rank == 0) {
        runs_[meaning.repeats] = Codeword(number);
        runs_[meaning.repeats].taken = meaning.repeats;
      } else {
        singles_[dictionary[meaning.rank]] = Codeword(number);
      }
    }
    singles_[dictionary[0]] = runs_[1];
    for (size_t run = 2; run <= kLongestRun; ++run) {
      if (runs_[run].length == 0) runs_[run] = runs_[run - 1];
    }
    for (unsigned byte = 0; byte < 256; ++byte) steps_[byte] = Packed(singles_[byte]);
    steps_[256 | dictionary[0]] = Packed(runs_[2]);
  }

  int mode() const { return mode_; }
  const uint8_t* dictionary() const { return dictionary_; }

  const Code& Single(unsigned byte) const { return singles_[byte]; }

  // The code of a byte, or with 256 added of two of the first byte: its inverse bits, and above
  // them its length. The hot loop of low mode has only this to load.
  uint32_t Step(unsigned byte) const { return steps_[byte]; }

  // The code that takes most of `run` first bytes, if `room` bits are left for it.
  const Code& Run(size_t run, unsigned room) const {
    const Code& longest = runs_[run];
    return longest.length <= room ? longest : runs_[std::min<size_t>(run, kShortRun)];
  }

 private:
  static uint32_t Packed(const Code& code) { return code.inverse | code.length << 16; }

  static constexpr size_t kShortRun = 4;  // the longest in 3 bits, in high mode

  int mode_;
  const uint8_t* dictionary_;
  Code singles_[256];
  uint32_t steps_[512] = {};
  Code runs_[kLongestRun + 1];
};

// Returns the stored bytes: fewer than, or as many as, those of the tile.
size_t EncodeTile(const EncodeTable& table, const uint8_t* tile, size_t tile_bytes, uint8_t* out,
                  uint8_t* coded);

struct Entry {
  uint8_t length;
  uint8_t repeats;
  uint8_t byte;
};

// For the next 12 bits: the code they begin with; and, for words without surprises, all the codes
// that they hold. Rebuilt only when the dictionary changes.
class DecodeTable {
 public:
  // Of the bits in a word, so many may be left before its last codes are looked up at once. All
  // lengths are multiples of 3, so 1, 4, 7 or 10 bits are left then.
  static constexpr unsigned kLast = 10;

  explicit DecodeTable(int mode);

  void Use(const uint8_t* dictionary);

  int mode() const { return mode_; }
  const Entry& operator[](uint64_t bits) const { return entries_[bits & 4095]; }

  // Up to 6 raw bytes, then how many they are (a run may be longer: the bytes after these are the
  // first of the dictionary), then the length of their codes. Nothing of END and the unused code.
  uint64_t Many(uint64_t bits) const { return many_[bits & 4095]; }

  // The same for the last `left` bits of a word; length 0 if they are not codes and fill.
  uint64_t Last(uint64_t bits, unsigned left) const { return last_[left / 3][bits & 1023]; }

  uint8_t first() const { return dictionary_[0]; }

  // Two of the first byte, where Many and Last have count and length.
  uint64_t padding() const { return padding_; }

 private:
  void Enter(Code code, uint8_t repeats, uint8_t byte);
  void Collect();
  uint64_t Pack(uint64_t bits, unsigned left, bool last) const;

  int mode_;
  bool filled_ = false;
  uint8_t dictionary_[kMaxDictionary] = {};
  uint64_t padding_ = 0;
  Entry entries_[4096];
  uint64_t many_[4096];
  uint64_t last_[4][1024];
};

// Returns whether the tile is good; otherwise *failure tells the engine and the cause.
// `stored_bytes` is a multiple of 128, at most `tile_bytes`, and at least 256 if coded; a tile that
// is not coded has `tile_bytes` of them.
bool DecodeTile(DecodeTable* table, const uint8_t* stored, size_t stored_bytes, bool coded,
                uint8_t* tile, size_t tile_bytes, unzip_failure* failure);

}  // namespace unzip

#endif  // SPARSE_COMPRESS_UNZIP_TILE_H_
