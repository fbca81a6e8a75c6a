// One call of a linear: what all pieces of its work read, and where they write.

#ifndef MS_QUANT_LINEAR_CALL_H_
#define MS_QUANT_LINEAR_CALL_H_

#include "blob.h"
#include "vectors.h"

namespace msq {
namespace {

constexpr int64_t kBlock = 64;  // inputs whose codes lie together, one row after the other
constexpr int64_t kWords = 16;  // of a block as codes; floats lie together in as many
constexpr int32_t kBias4 = 8;   // is added to codes of 4 bits in a panel

struct Call {
  const Weights& w;
  const Params& p;
  const float* x;
  int64_t rows;  // of this chunk
  float* y;
  int64_t tall;       // rows of a block
  int64_t words;      // of a row of codes, or of floats: whole blocks
  int32_t* codes;     // [block of rows][16 words][row of it][word of the 16]
  float* floats;      // the same of the inputs themselves
  float* scales;      // of rows
  int32_t* sums;      // [row][group]: of codes, times what was added to the weight's
  float* float_sums;  // [row][group] of inputs
  bool failed;
  bool* odd = nullptr;  // of rows of floats: they were not split into bytes

  int64_t blocks() const { return (rows + tall - 1) / tall; }
  int64_t rows_of(int64_t block) const { return at_most(tall, rows - block * tall); }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_LINEAR_CALL_H_
