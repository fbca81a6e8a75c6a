// A linear, for any instruction set: the algorithm for its inputs, and memory for it.
//
//   integer inputs                        integer_linear_impl.h
//   float inputs: few rows                byte_split_linear_impl.h, if S::kByteSplit
//                 up to 4 rows            direct_linear_impl.h
//                 more                    widened_linear_impl.h
//
// Each has two steps, whose pieces threads share: inputs are prepared row by row, or block by
// block, then each panel of the weight meets all of them. Rows come in chunks of kChunk, so that
// what is prepared stays in the cache.

#ifndef MS_QUANT_LINEAR_IMPL_H_
#define MS_QUANT_LINEAR_IMPL_H_

#include <stdint.h>

#include "byte_split_linear_impl.h"
#include "direct_linear_impl.h"
#include "float_inputs_impl.h"
#include "integer_linear_impl.h"
#include "quantize_impl.h"
#include "widened_linear_impl.h"

namespace msq {
namespace {

constexpr int64_t kChunk = 512;  // rows whose inputs are held at a time

template <class S>
struct Linear {
  static constexpr int R = S::kRows;
  static constexpr int64_t kColumns = Panel<S>::kColumns;
  using Split = ByteSplitLinear<S>;
  using Direct = DirectLinear<S>;
  static constexpr int64_t kRowsAlike = S::kByteSplit ? Split::kMostRows : 1;

  // For `rows` up to Split::kMostRows. Rows that cannot be split are computed on their own.
  static void by_byte_split(const Weights& w, const Params& p, const float* x, int64_t rows,
                            float* y, int threads, bool* out_of_memory) {
    const Segments segments(p);
    const int64_t words = up_to(p.inputs, kBlock) / 4, parts = rows * segments.count;
    void* bytes = scratch(0, up_to(rows * kSplit, Split::kTall) * words * 4);
    void* scales = scratch(1, parts * 4);
    int32_t* sums = static_cast<int32_t*>(scratch(2, (kSplit + 1) * parts * 4));
    bool* odd = static_cast<bool*>(scratch(6, rows));
    if (!bytes || !scales || !sums || !odd) {
      *out_of_memory = true;
      return;
    }
    float* float_sums = reinterpret_cast<float*>(sums + kSplit * parts);
    Call call = {w,       p,
                 x,       rows * kSplit,
                 y,       Split::kTall,
                 words,   static_cast<int32_t*>(bytes),
                 nullptr, static_cast<float*>(scales),
                 sums,    float_sums,
                 false,   odd};
    share_out(rows, threads, ByteSplit<S>::split, &call);
    share_out((p.outputs + kColumns - 1) / kColumns, threads, Split::one_panel, &call);
    for (int64_t row = 0; row < rows; ++row)
      if (odd[row])
        in_chunks(w, p, x + row * p.inputs, 1, y + row * p.outputs, threads, out_of_memory);
  }

  // Codes hide NaN in a row; a static scale does not show it either.
  static void keep_nan(const Call& c) {
    for (int64_t row = 0; row < c.rows; ++row)
      for (int64_t k = 0; c.scales[row] != c.scales[row] && k < c.p.outputs; ++k)
        c.y[row * c.p.outputs + k] = c.scales[row];
  }

  static void linear(const Weights& w, const Params& p, const float* x, int64_t rows, float* y,
                     int threads, bool* out_of_memory) {
    if constexpr (S::kByteSplit)
      if (p.input == MSQ_FLOAT && rows <= Split::kMostRows)
        return by_byte_split(w, p, x, rows, y, threads, out_of_memory);
    in_chunks(w, p, x, rows, y, threads, out_of_memory);
  }

  static Piece panel_of(const Call& c) {
    if (c.p.input != MSQ_FLOAT) return IntegerLinear<S>::one_panel;
    return c.rows <= Direct::kMostRows ? Direct::one_panel : WidenedLinear<S>::one_panel;
  }

  static void in_chunks(const Weights& w, const Params& p, const float* x, int64_t rows, float* y,
                        int threads, bool* out_of_memory) {
    const int64_t panels = (p.outputs + kColumns - 1) / kColumns;
    const bool integer = p.input != MSQ_FLOAT;
    const int64_t words = up_to(p.inputs, kBlock) / (integer ? 4 : 1);
    const int64_t most = at_most(rows, kChunk);
    void* inputs = scratch(0, up_to(most, R) * words * 4);
    float* scales = static_cast<float*>(scratch(1, most * 4));
    void* sums = scratch(2, most * p.groups() * 4);
    if (!inputs || !scales || !sums) {
      *out_of_memory = true;
      return;
    }
    for (int64_t first = 0; first < rows; first += kChunk) {
      const int64_t count = at_most(kChunk, rows - first);
      Call call = {w,
                   p,
                   x + first * p.inputs,
                   count,
                   y + first * p.outputs,
                   R,
                   words,
                   static_cast<int32_t*>(inputs),
                   static_cast<float*>(inputs),
                   scales,
                   static_cast<int32_t*>(sums),
                   static_cast<float*>(sums),
                   false};
      if (integer)
        share_out(count, threads, Quantize<S>::quantize, &call);
      else
        share_out(call.blocks(), threads, FloatInputs<S>::pack, &call);
      if (!call.failed) share_out(panels, threads, panel_of(call), &call);
      *out_of_memory |= call.failed;
      if (p.input == MSQ_STATIC) keep_nan(call);
    }
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_LINEAR_IMPL_H_
