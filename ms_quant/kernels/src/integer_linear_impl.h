// Linears of integer inputs: sums of a panel, then scales.
//
// Where each output has one scale, y = (sum - what was added to codes + bias) * token's scale *
// weight's scale: integers until the last step, so every instruction set gives the same bits. All
// blocks of rows meet a part of the panel of kHeld bytes, which stays in the first cache, before
// the next part; their sums wait in memory meanwhile. Where a weight has a scale for each group of
// inputs, a group's sums become floats and are added up, scaled, in registers; then one block of
// rows goes through the whole panel, because such sums of floats need not wait anywhere.

#ifndef MS_QUANT_INTEGER_LINEAR_IMPL_H_
#define MS_QUANT_INTEGER_LINEAR_IMPL_H_

#include <stdint.h>

#include "panel_impl.h"

namespace msq {
namespace {

template <class S>
struct IntegerLinear : Panel<S> {
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

  // The outputs at a column of a row, of the sums of all products there; `by` is their scale.
  static F of_sum(const Call& c, int64_t row, int64_t column, F by, I total) {
    const Params& p = c.p;
    I sum = S::isub(total, S::iset1(c.sums[row]));
    if (p.int_bias) sum = S::iadd(sum, S::iload(p.ints(p.int_bias) + column));
    F y = S::to_float(sum);
    if (p.input == MSQ_PER_TOKEN) y = S::mul(y, S::set1(c.scales[row]));
    return with_bias(p, column, S::mul(y, by));
  }

  // The same of the sums of groups, each times its scale.
  static F of_groups(const Call& c, int64_t row, int64_t column, F sum) {
    const Params& p = c.p;
    if (p.input == MSQ_PER_TOKEN) sum = S::mul(sum, S::set1(c.scales[row]));
    if (p.row_scale) sum = S::mul(sum, S::load(p.floats(p.row_scale) + column));
    return with_bias(p, column, sum);
  }

  // `sums` holds those of this block over the steps before `begin`, and gets those before `end`.
  template <int M, int BITS>
  static void rows(const Call& c, const uint8_t* panel, int64_t block, int64_t column,
                   int64_t begin, int64_t end, int32_t* sums) {
    const Params& p = c.p;
    const int32_t* in = c.codes + block * R * c.words;
    const int64_t groups = p.groups(), padded = p.padded();
    const int64_t whole = steps_of(p.inputs, BITS);
    const float* scale = p.floats(p.scale) + column;
    Sums<M> total;
    if (groups == 1 && !p.row_scale) {
      Base::template tile<M, BITS>(panel, in, begin, end, begin ? sums : nullptr, total);
      if (end < whole) {
        each<M>([&](auto m) __attribute__((always_inline)) {
          each<V>([&](auto v) __attribute__((always_inline)) {
            S::istore(sums + m * kColumns + v * W, total[m][v]);
          });
        });
        return;
      }
      each<V>([&](auto v) __attribute__((always_inline)) {
        const int64_t at = v * W;
        if (column + at >= p.outputs) return;
        const F by = S::load(scale + at);
        each<M>([&](auto m) __attribute__((always_inline)) {
          const int64_t row = block * R + m;
          put(c, row, column + at, of_sum(c, row, column + at, by, total[m][v]));
        });
      });
      return;
    }
    F y[M][V];
    for (auto& row : y)
      for (auto& value : row) value = S::set1(0.0f);
    const int64_t length = p.group / (32 / BITS);
    for (int64_t g = 0; g < groups; ++g) {
      Base::template tile<M, BITS>(panel, in, g * length, (g + 1) * length, nullptr, total);
      each<M>([&](auto m) __attribute__((always_inline)) {
        const I added = S::iset1(c.sums[(block * R + m) * groups + g]);
        each<V>([&](auto v) __attribute__((always_inline)) {
          const F sum = S::to_float(S::isub(total[m][v], added));
          y[m][v] = S::fma(sum, S::load(scale + g * padded + v * W), y[m][v]);
        });
      });
    }
    for (int v = 0; v < V; ++v) {
      const int64_t at = column + v * W;
      if (at >= p.outputs) break;
      for (int m = 0; m < M; ++m) {
        const int64_t row = block * R + m;
        put(c, row, at, of_groups(c, row, at, y[m][v]));
      }
    }
  }

  template <int M, int BITS>
  static void some_rows(const Call& c, const uint8_t* panel, int64_t block, int64_t column,
                        int64_t begin, int64_t end, int32_t* sums) {
    if (c.rows_of(block) == M) return rows<M, BITS>(c, panel, block, column, begin, end, sums);
    if constexpr (M > 1) some_rows<M - 1, BITS>(c, panel, block, column, begin, end, sums);
  }

  static void one_panel(void* job, int64_t index) {
    Call& c = *static_cast<Call*>(job);
    const int64_t whole = steps_of(c.p.inputs, c.w.bits), column = index * kColumns;
    const uint8_t* panel = c.w.words() + index * whole * kColumns * 4;
    const int64_t blocks = c.blocks();
    const bool at_once = blocks == 1 || c.p.groups() > 1 || c.p.row_scale;
    const int64_t held = at_once ? whole : kHeld / (kColumns * 4);
    int32_t* sums = static_cast<int32_t*>(scratch(3, at_once ? 1 : blocks * R * kColumns * 4));
    if (!sums) {
      c.failed = true;
      return;
    }
    for (int64_t begin = 0; begin < whole; begin += held) {
      const int64_t end = at_most(whole, begin + held);
      for (int64_t block = 0; block < blocks; ++block) {
        int32_t* here = sums + (at_once ? 0 : block * R * kColumns);
        if (c.w.bits == 8)
          some_rows<R, 8>(c, panel, block, column, begin, end, here);
        else
          some_rows<R, 4>(c, panel, block, column, begin, end, here);
      }
    }
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_INTEGER_LINEAR_IMPL_H_
