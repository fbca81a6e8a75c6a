// Linears of many rows of floats: the panel's codes become floats, which all rows meet.
//
// The weights of kDepth inputs, (code - zero point) * scale, are written as floats to a buffer of
// 32 KiB at most, [input][output of the panel], which stays in the cache. Then each block of kRows
// rows goes through them: its sums stay in registers, an input's weights are kVectors loads, and
// each row broadcasts its input, one multiplication and sum for each register of sums. The work of
// widening is shared by all rows, up to kChunk of them; their sums wait in memory between two such
// depths.

#ifndef MS_QUANT_WIDENED_LINEAR_IMPL_H_
#define MS_QUANT_WIDENED_LINEAR_IMPL_H_

#include <stdint.h>
#include <string.h>

#include "panel_impl.h"

namespace msq {
namespace {

constexpr int64_t kDepth = 256;  // inputs whose weights are held as floats at a time

template <class S>
struct WidenedLinear : Panel<S> {
  using Base = Panel<S>;
  using Base::kColumns;
  using Base::put;
  using Base::R;
  using Base::V;
  using Base::W;
  using Base::with_bias;
  using typename Base::F;
  using typename Base::I;

  // The weights (code - zero point) * scale of inputs [begin, end): [input][column of the panel].
  template <int BITS>
  static void widen(const Params& p, const uint8_t* panel, int64_t column, int64_t begin,
                    int64_t end, float* out) {
    constexpr int N = 32 / BITS;
    const float *scale = p.floats(p.scale) + column, *zero = p.floats(p.zero_scale);
    const int64_t padded = p.padded();
    for (int64_t k = begin; k < end; k += N) {
      if (k >= p.inputs) {  // the rest of the last block; its inputs are zeros
        memset(out + (k - begin) * kColumns, 0, static_cast<size_t>((end - k) * kColumns * 4));
        return;
      }
      const int64_t g = k / p.group;
      for (int v = 0; v < V; ++v) {
        const I words = S::iload(panel + (k / N * kColumns + v * W) * 4);
        const F by = S::load(scale + g * padded + v * W);
        const F shift = zero ? S::load(zero + g * padded + column + v * W) : S::set1(0.0f);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          const F code = BITS == 8 ? S::byte(words, i) : S::half(words, i);
          S::store(out + (k - begin + i) * kColumns + v * W, S::mul(S::sub(code, shift), by));
        }
      }
    }
  }

  // Products of M rows with `depth` inputs' weights; `sums` holds those before if it has `begun`.
  template <int M>
  static void rows(const float* in, const float* weights, int64_t depth, float* sums, bool begun) {
    F y[M][V];
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<V>([&](auto v) __attribute__((always_inline)) {
        y[m][v] = begun ? S::load(sums + m * kColumns + v * W) : S::set1(0.0f);
      });
    });
    for (int64_t k = 0; k < depth; k += kWords, in += M * kWords)  // depth is whole blocks
      for (int64_t i = 0; i < kWords; ++i, weights += kColumns) {
        F w[V];
        each<V>([&](auto v) __attribute__((always_inline)) { w[v] = S::load(weights + v * W); });
        each<M>([&](auto m) __attribute__((always_inline)) {
          const F x = S::set1(in[m * kWords + i]);
          each<V>([&](auto v)
                      __attribute__((always_inline)) { y[m][v] = S::fma(w[v], x, y[m][v]); });
        });
      }
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<V>([&](auto v) __attribute__((always_inline)) {
        S::store(sums + m * kColumns + v * W, y[m][v]);
      });
    });
  }

  template <int M>
  static void some_rows(int64_t count, const float* in, const float* weights, int64_t depth,
                        float* sums, bool begun) {
    if (count == M) return rows<M>(in, weights, depth, sums, begun);
    if constexpr (M > 1) some_rows<M - 1>(count, in, weights, depth, sums, begun);
  }

  static void one_panel(void* job, int64_t index) {
    Call& c = *static_cast<Call*>(job);
    const Params& p = c.p;
    const int64_t column = index * kColumns, n = c.words;
    const uint8_t* panel = c.w.words() + index * steps_of(p.inputs, c.w.bits) * kColumns * 4;
    const int64_t blocks = c.blocks();
    const int64_t size = kDepth * kColumns + blocks * R * kColumns;
    float* weights = static_cast<float*>(scratch(3, size * 4));
    if (!weights) {
      c.failed = true;
      return;
    }
    float* sums = weights + kDepth * kColumns;
    for (int64_t begin = 0; begin < n; begin += kDepth) {
      const int64_t end = at_most(n, begin + kDepth);
      if (c.w.bits == 8)
        widen<8>(p, panel, column, begin, end, weights);
      else
        widen<4>(p, panel, column, begin, end, weights);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t count = c.rows_of(block);
        const float* in = c.floats + block * R * n + begin * count;
        some_rows<R>(count, in, weights, end - begin, sums + block * R * kColumns, begin > 0);
      }
    }
    for (int64_t row = 0; row < c.rows; ++row)
      for (int v = 0; v < V && column + v * W < p.outputs; ++v) {
        const int64_t at = column + v * W;
        put(c, row, at, with_bias(p, at, S::load(sums + row * kColumns + v * W)));
      }
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_WIDENED_LINEAR_IMPL_H_
