// The products of sparse_attention_impl.h, and its powers.
//
// A tile of rows, kFloatRows keys or columns of values, meets a panel of queries that lie side by
// side in N vectors: sums stay in registers, each row broadcasts its number, as a block of rows
// does in widened_linear_impl.h. Rows are read where they lie, so nothing is packed but queries.

#ifndef MS_QUANT_SPARSE_PRODUCTS_IMPL_H_
#define MS_QUANT_SPARSE_PRODUCTS_IMPL_H_

#include "vectors.h"

namespace msq {
namespace {

template <class S>
struct SparseProducts {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int W = S::kWidth, V = S::kVectors, R = S::kFloatRows;

  // 2^x within 2 units in the last place, for x up to 0; 0 below -100, so that products are not
  // subnormal.
  static F power(F x) {
    const F inside = S::at_least(x, -100.0f);
    const F n = S::round(inside);
    const F r = S::sub(inside, n);
    F p = S::set1(1.534581242594868e-4f);
    p = S::fma(p, r, S::set1(1.3399930903688073e-3f));
    p = S::fma(p, r, S::set1(9.618489071726799e-3f));
    p = S::fma(p, r, S::set1(5.550328642129898e-2f));
    p = S::fma(p, r, S::set1(0.24022646248340607f));
    p = S::fma(p, r, S::set1(0.6931471824645996f));
    p = S::fma(p, r, S::set1(1.0f));
    return S::zero_below(S::ldexp(p, n), x, -100.0f);
  }

  // Sums of M rows times the vectors of a panel: row m of term k is a[m * row + k * step]. Sums
  // before are multiplied by `factors`, if there are any.
  template <int M, int N>
  static void product(const float* a, int64_t row, int64_t step, const float* panel, int64_t terms,
                      const float* factors, float* sums) {
    F y[M][N];
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<N>([&](auto v) __attribute__((always_inline)) {
        y[m][v] = factors ? S::mul(S::load(sums + (m * N + v) * W), S::load(factors + v * W))
                          : S::set1(0.0f);
      });
    });
    for (int64_t k = 0; k < terms; ++k, a += step, panel += N * W) {
      F b[N];
      each<N>([&](auto v) __attribute__((always_inline)) { b[v] = S::load(panel + v * W); });
      each<M>([&](auto m) __attribute__((always_inline)) {
        const F x = S::set1(a[m * row]);
        each<N>([&](auto v) __attribute__((always_inline)) { y[m][v] = S::fma(b[v], x, y[m][v]); });
      });
    }
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<N>([&](auto v)
                  __attribute__((always_inline)) { S::store(sums + (m * N + v) * W, y[m][v]); });
    });
  }

  // Rows of the tiles after those of `rows`: few kinds of them, for the compiler's sake.
  static constexpr int fewer(int rows) { return rows > 8 ? 8 : rows > 4 ? 4 : rows > 2 ? 2 : 1; }

  // As `product`, for any number of rows.
  template <int N, int M = R>
  static void products(int64_t rows, const float* a, int64_t row, int64_t step, const float* panel,
                       int64_t terms, const float* factors, float* sums) {
    for (; rows >= M; rows -= M, a += M * row, sums += M * N * W)
      product<M, N>(a, row, step, panel, terms, factors, sums);
    if constexpr (M > 1)
      if (rows) products<N, fewer(M)>(rows, a, row, step, panel, terms, factors, sums);
  }

  // Scores of M keys: products of bytes of one block of columns, times scales.
  template <int M, int N>
  static void bytes(const int32_t* keys, int64_t row, const int32_t* panel, int64_t words,
                    const int32_t* less, const float* key_scales, const float* query_scales,
                    bool begun, float* scores) {
    I sums[M][N];
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<N>([&](auto v) __attribute__((always_inline)) { sums[m][v] = S::izero(); });
    });
    for (int64_t k = 0; k < words; ++k, panel += N * W) {
      typename S::Codes codes[N];
      each<N>([&](auto v)
                  __attribute__((always_inline)) { codes[v] = S::codes(S::iload(panel + v * W)); });
      each<M>([&](auto m) __attribute__((always_inline)) {
        const typename S::Inputs x = S::inputs(keys + m * row + k);
        each<N>([&](auto v) __attribute__((always_inline)) { S::dot(sums[m][v], codes[v], x); });
      });
    }
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<N>([&](auto v) __attribute__((always_inline)) {
        const F by = S::mul(S::set1(key_scales[m]), S::load(query_scales + v * W));
        const F sum = S::to_float(S::isub(sums[m][v], S::iset1(less[m])));
        float* out = scores + (m * N + v) * W;
        S::store(out, begun ? S::fma(sum, by, S::load(out)) : S::mul(sum, by));
      });
    });
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_SPARSE_PRODUCTS_IMPL_H_
