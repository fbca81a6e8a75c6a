#include "tile.h"

namespace unzip {
namespace {

constexpr unsigned kBytes = 6;  // of an entry of Many

}  // namespace

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
  for (int number = 0; number < kCodewords; ++number) {
    const Meaning meaning = MeaningOf(mode_, number);
    Enter(Codeword(number), meaning.repeats, dictionary[meaning.rank]);
  }
  Collect();
}

void DecodeTable::Enter(Code code, uint8_t repeats, uint8_t byte) {
  for (unsigned bits = code.bits; bits < 4096; bits += 1u << code.length) {
    entries_[bits] = Entry{code.length, repeats, byte};
  }
}

void DecodeTable::Collect() {
  padding_ = uint64_t{0x0101} * dictionary_[0] << 48;
  for (unsigned bits = 0; bits < 4096; ++bits) many_[bits] = Pack(bits, 12, false);
  for (unsigned left = 1; left <= kLast; left += 3) {
    for (unsigned bits = 0; bits < 1u << left; ++bits)
      last_[left / 3][bits] = Pack(bits, left, true);
  }
}

uint64_t DecodeTable::Pack(uint64_t bits, unsigned left, bool last) const {
  uint64_t packed = uint64_t{0x010101010101} * dictionary_[0];
  unsigned count = 0, length = 0;
  for (;;) {
    if (last && bits == (uint64_t{1} << left) - 1)
      return packed | uint64_t{count} << 48 | uint64_t{1} << 56;
    const Entry entry = entries_[bits];
    const bool run = entry.byte == dictionary_[0];
    if (entry.length > left || entry.repeats == kEnd || entry.repeats == kUnused) break;
    if (count > 0 && count + entry.repeats > kBytes) break;
    if (!run) {
      packed &= ~(uint64_t{0xFF} << 8 * count);
      packed |= uint64_t{entry.byte} << 8 * count;
    }
    count += entry.repeats;
    length += entry.length;
    left -= entry.length;
    bits >>= entry.length;
  }
  return last ? packed : packed | uint64_t{count} << 48 | uint64_t{length} << 56;
}

}  // namespace unzip
