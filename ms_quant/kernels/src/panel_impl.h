// A block of rows meets a panel of the weight: sums of products of bytes, exact in 32 bits.
//
// This is the register blocking of a matrix product (Goto and van de Geijn, "Anatomy of
// High-Performance Matrix Multiplication", 2008). The sums of kRows rows of inputs and kVectors
// vectors of outputs stay in registers. Each step loads the panel's next words once, one vector
// for kWidth outputs, and for each row broadcasts one word of inputs, four codes, to all lanes;
// `dot` adds four products to each lane. Both lie in the order in which they are read: panels as
// blob.h says, inputs in blocks of 16 words, one row after the other. Words of 4-bit codes are two
// words of bytes: their low halves meet one word of inputs, their high halves the next. One row
// alone would wait for each `dot` to end before the next, so it has four sets of sums, two rows
// have two, and they are added at the end.

#ifndef MS_QUANT_PANEL_IMPL_H_
#define MS_QUANT_PANEL_IMPL_H_

#include <stdint.h>

#include <type_traits>

#include "linear_call.h"

namespace msq {
namespace {

constexpr int64_t kHeld = 1 << 15;  // bytes of a panel that all rows meet before the next ones
constexpr int64_t kAhead = 2048;    // bytes of a panel that are asked for before they are needed

// Whether S has a `tile` that takes the place of Panel's.
template <class S, class = void>
constexpr bool kOwnTile = false;
template <class S>
constexpr bool kOwnTile<S, std::void_t<decltype(&S::template tile<2, 8>)>> = true;

template <class S>
struct Panel {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int W = S::kWidth, V = S::kVectors, R = S::kRows;
  static constexpr int64_t kColumns = int64_t{W} * V;

  template <int M>
  using Sums = I[M][V];

  // Adds the products of one word of inputs; `in` is that of the first row.
  template <int M>
  __attribute__((always_inline)) static void one_word(const int32_t* in,
                                                      const typename S::Codes (&codes)[V],
                                                      Sums<M>& sums) {
    each<M>([&](auto m) __attribute__((always_inline)) {
      const typename S::Inputs x = S::inputs(in + m * kWords);
      each<V>([&](auto v) __attribute__((always_inline)) { S::dot(sums[m][v], codes[v], x); });
    });
  }

  // The products of steps [begin, end) of a panel, on top of what `before` holds if there is any.
  template <int M, int BITS>
  __attribute__((always_inline)) static void tile(const uint8_t* panel, const int32_t* in,
                                                  int64_t begin, int64_t end, const int32_t* before,
                                                  Sums<M>& total) {
    if constexpr (M > 1 && kOwnTile<S>)
      return S::template tile<M, BITS>(panel, in, begin, end, before, total);
    constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;  // sets of sums
    constexpr int64_t kBytes = kColumns * 4, kEach = BITS == 8 ? 1 : 2, kSteps = kWords / kEach;
    I sums[U][M][V];
    each<U>([&](auto u) __attribute__((always_inline)) {
      each<M>([&](auto m) __attribute__((always_inline)) {
        each<V>([&](auto v) __attribute__((always_inline)) {
          sums[u][m][v] = u == 0 && before ? S::iload(before + m * kColumns + v * W) : S::izero();
        });
      });
    });
    const uint8_t* at = panel + begin * kBytes;
    const int32_t* x = nullptr;
    const auto one = [&](auto u) __attribute__((always_inline)) {
      typename S::Codes low[V], high[V];
      each<V>([&](auto v) __attribute__((always_inline)) {
        const I words = S::iload(at + v * W * 4);
        if constexpr (BITS == 8) {
          low[v] = S::codes(words);
        } else {
          low[v] = S::codes(S::low_halves(words));
          high[v] = S::codes(S::high_halves(words));
        }
      });
      one_word<M>(x, low, sums[u]);
      if constexpr (BITS == 4) one_word<M>(x + 1, high, sums[u]);
      at += kBytes;
      x += kEach;
    };
    for (int64_t step = begin; step < end;) {
      const int64_t stop = at_most(end, (step / kSteps + 1) * kSteps);
      x = in + step / kSteps * kWords * M + step % kSteps * kEach;
      for (; step + U <= stop; step += U) {
        for (int64_t line = 0; line < U * kBytes; line += 64)
          S::prefetch(at + (M <= 2 ? kAhead : kHeld) + line);
        each<U>([&](auto u) __attribute__((always_inline)) { one(u); });
      }
      for (; step < stop; ++step) one(Index<0>());
    }
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<V>([&](auto v) __attribute__((always_inline)) {
        total[m][v] = sums[0][m][v];
        each<U - 1>([&](auto u) __attribute__((always_inline)) {
          total[m][v] = S::iadd(total[m][v], sums[u + 1][m][v]);
        });
      });
    });
  }

  // Writes the outputs of a row from `column` on, as many as there are.
  static void put(const Call& c, int64_t row, int64_t column, F value) {
    float* out = c.y + row * c.p.outputs + column;
    const int64_t left = c.p.outputs - column;
    if (left >= W) return S::store(out, value);
    alignas(64) float part[W];
    S::store(part, value);
    for (int64_t i = 0; i < left; ++i) out[i] = part[i];
  }

  static F with_bias(const Params& p, int64_t column, F y) {
    return p.bias ? S::add(y, S::load(p.floats(p.bias) + column)) : y;
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_PANEL_IMPL_H_
