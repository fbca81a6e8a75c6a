#include "tile.h"

namespace unzip {
DecodeTable::DecodeTable(int mode) : mode_(mode) {
  Enter(Reversed(0b111011111, kEndLength), kEnd, 0);
  for (unsigned byte = 0; byte < 256; ++byte) {
    Enter(Literal(byte), 1, static_cast<uint8_t>(byte));
  }
}

void DecodeTable::Use(const uint8_t* dictionary) {
  const size_t size = DictionarySize(mode_);
  if (filled_ && std::memcmp(dictionary_, dictionary, size) == 0) return;
  std::memcpy(dictionary_, dictionary, size);
  filled_ = true;
  run_ = uint64_t{0x0101010101010101} * dictionary[0];
  for (int number = 0; number < kCodewords; ++number) {
    const Meaning meaning = MeaningOf(mode_, number);
    Enter(Codeword(number), meaning.repeats, dictionary[meaning.rank]);
  }
  for (unsigned bits = 0; bits < 4096; ++bits) steps_[~bits & 4095] = Collect(bits);
  // Twelve ones may also fill a word: left to those who look closer.
  steps_[0] = 0;
}

void DecodeTable::Enter(Code code, uint8_t repeats, uint8_t byte) {
  for (unsigned bits = code.bits; bits < 4096; bits += 1u << code.length) {
    entries_[bits] = Entry{code.length, repeats, byte};
  }
}

uint64_t DecodeTable::Collect(uint64_t bits) const {
  uint64_t bytes = run_ >> 8 * (8 - kBytes);
  unsigned count = 0, length = 0;
  for (;;) {
    const Entry entry = entries_[bits];
    const bool run = entry.byte == dictionary_[0];
    const unsigned most = run && mode_ == kHigh ? kBytes + kMore : kBytes;
    if (entry.repeats == kEnd || entry.repeats == kUnused || length + entry.length > 12 ||
        count + entry.repeats > most) {
      return length | bytes << 8 | uint64_t{count} << 56;
    }
    if (!run) bytes ^= static_cast<uint64_t>(entry.byte ^ dictionary_[0]) << 8 * count;
    count += entry.repeats;
    length += entry.length;
    bits >>= entry.length;
  }
}

}  // namespace unzip
