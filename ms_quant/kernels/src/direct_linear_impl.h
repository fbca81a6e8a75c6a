// Linears of up to four rows of floats, straight from the words of the panel.
//
// With so few rows the panel is read once and reading it is the cost, so no floats of it are kept:
// a vector of words is loaded, each of its codes is made a vector of floats in registers, and is
// multiplied by the same input of each row. A group's sums stay in registers until its scale and
// zero point are applied to them, once for each group and not for each code. One row has four sets
// of sums and two rows two, as in panel_impl.h.

#ifndef MS_QUANT_DIRECT_LINEAR_IMPL_H_
#define MS_QUANT_DIRECT_LINEAR_IMPL_H_

#include <stdint.h>

#include "panel_impl.h"

namespace msq {
namespace {

template <class S>
struct DirectLinear : Panel<S> {
  using Base = Panel<S>;
  using Base::kColumns;
  using Base::put;
  using Base::R;
  using Base::V;
  using Base::W;
  using Base::with_bias;
  using typename Base::F;
  using typename Base::I;
  static constexpr int kMostRows = R < 4 ? R : 4;  // for which this is the fastest

  // The outputs of M rows in a panel.
  template <int M, int BITS>
  static void rows(const Call& c, const uint8_t* panel, int64_t column) {
    const Params& p = c.p;
    constexpr int N = 32 / BITS;                    // inputs of a word
    constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;  // sets of sums
    const int64_t groups = p.groups(), padded = p.padded();
    const int64_t length = groups == 1 ? steps_of(p.inputs, BITS) : p.group / N;
    const float *scale = p.floats(p.scale) + column, *zero = p.floats(p.zero_scale);
    F y[M][V];
    for (auto& row : y)
      for (auto& value : row) value = S::set1(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      F sums[U][M][V];
      each<U>([&](auto u) __attribute__((always_inline)) {
        each<M>([&](auto m) __attribute__((always_inline)) {
          each<V>([&](auto v) __attribute__((always_inline)) { sums[u][m][v] = S::set1(0.0f); });
        });
      });
      for (int64_t step = g * length; step < (g + 1) * length; ++step) {
        const uint8_t* at = panel + step * kColumns * 4;
        S::prefetch(at + kAhead);
        S::prefetch(at + kAhead + 64);
        const float* in = c.floats + step * N / kWords * kWords * M + step * N % kWords;
        I words[V];
        each<V>([&](auto v)
                    __attribute__((always_inline)) { words[v] = S::iload(at + v * W * 4); });
        each<N>([&](auto i) __attribute__((always_inline)) {
          each<V>([&](auto v) __attribute__((always_inline)) {
            const F code = BITS == 8 ? S::byte(words[v], i) : S::half(words[v], i);
            each<M>([&](auto m) __attribute__((always_inline)) {
              F& sum = sums[i % U][m][v];
              sum = S::fma(code, S::set1(in[m * kWords + i]), sum);
            });
          });
        });
      }
      F parts[M][V];
      each<M>([&](auto m) __attribute__((always_inline)) {
        each<V>([&](auto v) __attribute__((always_inline)) {
          parts[m][v] = sums[0][m][v];
          each<U - 1>([&](auto u) __attribute__((always_inline)) {
            parts[m][v] = S::add(parts[m][v], sums[u + 1][m][v]);
          });
        });
      });
      for (int v = 0; v < V; ++v) {
        const F by = S::load(scale + g * padded + v * W);
        for (int m = 0; m < M; ++m) {
          F sum = parts[m][v];
          if (zero) {
            const F shift = S::load(zero + g * padded + column + v * W);
            sum = S::sub(sum, S::mul(shift, S::set1(c.float_sums[m * groups + g])));
          }
          y[m][v] = S::fma(sum, by, y[m][v]);
        }
      }
    }
    for (int v = 0; v < V; ++v) {
      const int64_t at = column + v * W;
      if (at >= p.outputs) break;
      for (int m = 0; m < M; ++m) put(c, m, at, with_bias(p, at, y[m][v]));
    }
  }

  template <int M, int BITS>
  static void some_rows(const Call& c, const uint8_t* panel, int64_t column) {
    if (c.rows == M) return rows<M, BITS>(c, panel, column);
    if constexpr (M > 1) some_rows<M - 1, BITS>(c, panel, column);
  }

  static void one_panel(void* job, int64_t index) {
    const Call& c = *static_cast<Call*>(job);
    const int64_t column = index * kColumns;
    const uint8_t* panel = c.w.words() + index * steps_of(c.p.inputs, c.w.bits) * kColumns * 4;
    if (c.w.bits == 8) return some_rows<kMostRows, 8>(c, panel, column);
    some_rows<kMostRows, 4>(c, panel, column);
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_DIRECT_LINEAR_IMPL_H_
