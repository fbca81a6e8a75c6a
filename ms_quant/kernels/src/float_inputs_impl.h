// Inputs of linears that multiply floats, in the order in which these read them.
//
// A block of rows lies in pieces of 16 inputs, one row after the other, smoothed if the linear has
// a smoothing vector and with zeros beyond the last input. Where the weight has zero points, a
// group's sum of inputs is kept too: sum x (code - zero) = sum x code - zero sum x.

#ifndef MS_QUANT_FLOAT_INPUTS_IMPL_H_
#define MS_QUANT_FLOAT_INPUTS_IMPL_H_

#include <stdint.h>

#include "panel_impl.h"

namespace msq {
namespace {

template <class S>
struct FloatInputs {
  static constexpr int R = S::kRows;

  static void pack(void* job, int64_t block) {
    Call& c = *static_cast<Call*>(job);
    const int64_t n = c.p.inputs, count = c.rows_of(block);
    const float* mul = c.p.floats(c.p.mul);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t index = block * R + r;
      const float* x = c.x + index * n;
      float* out = c.floats + block * R * c.words + r * kWords;
      for (int64_t k = 0; k < c.words; k += kWords, out += count * kWords)
        for (int64_t i = 0; i < kWords; ++i)
          out[i] = k + i >= n ? 0.0f : mul ? x[k + i] * mul[k + i] : x[k + i];
      for (int64_t g = 0; c.p.zero_scale && g < c.p.groups(); ++g) {
        float sum = 0;
        for (int64_t k = g * c.p.group; k < (g + 1) * c.p.group; ++k)
          sum += mul ? x[k] * mul[k] : x[k];
        c.float_sums[index * c.p.groups() + g] = sum;
      }
    }
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_FLOAT_INPUTS_IMPL_H_
