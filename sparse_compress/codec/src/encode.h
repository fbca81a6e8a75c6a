// The codes of bytes, one by one and by twos, and what coding tiles takes.
#ifndef SPARSE_COMPRESS_UNZIP_ENCODE_H_
#define SPARSE_COMPRESS_UNZIP_ENCODE_H_

#include <memory>

#include "tile.h"

namespace unzip {

// One or two codes, and their sums: raw bytes, and from bit kLength on bits, so that the sums of a
// word that is too long are negative.
struct EncodeStep {
  static constexpr unsigned kLength = 25;
  uint32_t codes;
  uint32_t sums;
};

// A word takes 5 codes at least, so no stream is twice as long as its raw bytes.
using Stream = uint8_t[2 * kMaxEngine + kSlack];

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
    if (mode == kLow) EnterSteps();
  }

  int mode() const { return mode_; }
  const uint8_t* dictionary() const { return dictionary_; }

  const Code& Single(unsigned byte) const { return singles_[byte]; }

  // The step to take with the next bytes in low mode.
  const EncodeStep& Pair(const uint8_t* raw) const { return pairs_[LoadPair(raw)]; }

  // The same with the next one alone.
  const EncodeStep& One(unsigned byte) const { return ones_[byte]; }

  // The code that takes most of `run` first bytes, if `room` bits are left for it.
  const Code& Run(size_t run, unsigned room) const {
    const Code& longest = runs_[run];
    return longest.length <= room ? longest : runs_[std::min<size_t>(run, kShortRun)];
  }

 private:
  static EncodeStep StepOf(const Code& code) {
    return EncodeStep{code.bits, uint32_t{code.length} << EncodeStep::kLength | code.taken};
  }

  void EnterSteps() {
    uint32_t behind[256];  // what to multiply a code by that follows one of a byte
    for (unsigned byte = 0; byte < 256; ++byte) {
      ones_[byte] = StepOf(singles_[byte]);
      behind[byte] = 1u << singles_[byte].length;
    }
    pairs_.reset(new EncodeStep[1 << 16]);
    for (unsigned next = 0; next < 256; ++next) {
      // A run may go on behind the second byte: it begins a step of its own.
      const EncodeStep second = next == dictionary_[0] ? EncodeStep{0, 0} : ones_[next];
      EncodeStep* row = &pairs_[next << 8];
      for (unsigned byte = 0; byte < 256; ++byte) {
        row[byte].codes = ones_[byte].codes | second.codes * behind[byte];
        row[byte].sums = ones_[byte].sums + second.sums;
      }
    }
    pairs_[dictionary_[0] * 0x101u] = StepOf(runs_[2]);
  }

  static constexpr size_t kShortRun = 4;  // the longest in 3 bits, in high mode

  int mode_;
  const uint8_t* dictionary_;
  Code singles_[256];
  EncodeStep ones_[256];
  std::unique_ptr<EncodeStep[]> pairs_;
  Code runs_[kLongestRun + 1];
};

// What coding two tiles at once needs.
struct EncodeSpace {
  Raw raw[2 * kEngines];
  Stream streams[2 * kEngines];
};

// Codes tiles that lie back to back, and lays them out likewise. Returns the stored bytes, not more
// than the raw ones.
int64_t EncodeTiles(const EncodeTable& table, const uint8_t* raw, const int64_t* tile_sizes,
                    int64_t tiles, EncodeSpace* space, uint8_t* out, int64_t* stored,
                    uint8_t* coded);

}  // namespace unzip

#endif  // SPARSE_COMPRESS_UNZIP_ENCODE_H_
