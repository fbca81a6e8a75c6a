// Linears of a few rows of floats, as products of bytes.
//
// To make a float of a code takes longer than to multiply it, so for few rows the inputs are made
// what codes can be multiplied with as they are: byte_split_impl.h makes four rows of bytes of a
// row of floats. These rows meet a panel as rows of integer inputs do, a block of kTall of
// them at a time. A segment's four sums are put together again from the lowest byte's up, by
// Horner's rule in 1/256, less what the weight's bias or zero point adds, times the segment's power
// of two and the group's scale; segments are added in float.

#ifndef MS_QUANT_BYTE_SPLIT_LINEAR_IMPL_H_
#define MS_QUANT_BYTE_SPLIT_LINEAR_IMPL_H_

#include <stdint.h>

#include "byte_split_impl.h"
#include "panel_impl.h"

namespace msq {
namespace {

template <class S>
struct ByteSplitLinear : Panel<S> {
  using Base = Panel<S>;
  using Base::kColumns;
  using Base::put;
  using Base::R;
  using Base::V;
  using Base::W;
  using Base::with_bias;
  using typename Base::F;
  using typename Base::I;
  template <int M>
  using Sums = typename Base::template Sums<M>;
  static constexpr int kTall = R / kSplit * kSplit;  // rows of bytes in a block
  static constexpr int64_t kMostRows = 2 * kTall;    // of floats, for which this is the fastest

  // A block of M rows of bytes, M / kSplit of floats.
  template <int M, int BITS>
  static void rows(const Call& c, const uint8_t* panel, int64_t block, int64_t column) {
    const Params& p = c.p;
    const Segments segments(p);
    constexpr int N = 32 / BITS, T = M / kSplit;
    const int64_t first = block * c.tall / kSplit, padded = p.padded();
    const float *scale = p.floats(p.scale) + column, *zero = p.floats(p.zero_scale);
    const int32_t* in = c.codes + block * c.tall * c.words;
    F y[T][V];
    for (auto& row : y)
      for (auto& value : row) value = S::set1(0.0f);
    for (int64_t s = 0; s < segments.count; ++s) {
      const int64_t g = s / segments.parts * padded;
      Sums<M> total;
      Base::template tile<M, BITS>(panel, in, segments.begin(s) / N, (segments.end(s) + N - 1) / N,
                                   nullptr, total);
      each<T>([&](auto t) __attribute__((always_inline)) {
        const int64_t at = (first + t) * segments.count + s;
        const int32_t* added = c.sums + kSplit * at;
        each<V>([&](auto v) __attribute__((always_inline)) {
          F sum = S::set1(0.0f);
          each<kSplit>([&](auto b) __attribute__((always_inline)) {
            const I bytes = S::isub(total[kSplit * t + b][v], S::iset1(added[b]));
            sum = S::fma(sum, S::set1(1.0f / 256), S::to_float(bytes));
          });
          if (zero)
            sum =
                S::sub(sum, S::mul(S::load(zero + g + column + v * W), S::set1(c.float_sums[at])));
          sum = S::mul(sum, S::set1(c.scales[at]));
          y[t][v] = S::fma(sum, S::load(scale + g + v * W), y[t][v]);
        });
      });
    }
    for (int v = 0; v < V; ++v) {
      const int64_t at = column + v * W;
      if (at >= p.outputs) break;
      for (int t = 0; t < T; ++t) put(c, first + t, at, with_bias(p, at, y[t][v]));
    }
  }

  template <int M, int BITS>
  static void some_rows(const Call& c, const uint8_t* panel, int64_t block, int64_t column) {
    if (c.rows_of(block) == M) return rows<M, BITS>(c, panel, block, column);
    if constexpr (M > kSplit) some_rows<M - kSplit, BITS>(c, panel, block, column);
  }

  static void one_panel(void* job, int64_t index) {
    Call& c = *static_cast<Call*>(job);
    const int64_t column = index * kColumns;
    const uint8_t* panel = c.w.words() + index * steps_of(c.p.inputs, c.w.bits) * kColumns * 4;
    for (int64_t block = 0; block < c.blocks(); ++block)
      if (c.w.bits == 8)
        some_rows<kTall, 8>(c, panel, block, column);
      else
        some_rows<kTall, 4>(c, panel, block, column);
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_BYTE_SPLIT_LINEAR_IMPL_H_
