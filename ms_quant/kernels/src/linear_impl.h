// The linears, for any instruction set. `S` says what its vectors do:
//
//   F, I                 kWidth floats, kWidth 32-bit integers
//   Codes, Inputs        what `dot` takes of a weight's word and of an input's, as prepared
//   dot(sum, codes, in)  sum + the four products in each word, exactly
//   kRows, kVectors      of sums that fit in its registers: rows of inputs, vectors of outputs
//   kBias                what is added to codes of 8 bits, as `dot` reads them without a sign
//   tile                 if it has one, sums of several rows in another way than by `dot`
//   kByDigits            whether floats times codes are products of bytes for some rows
//
// Each file that includes this is compiled for one instruction set: see quantize_impl.h for what it
// may not call.

#ifndef MS_QUANT_LINEAR_IMPL_H_
#define MS_QUANT_LINEAR_IMPL_H_

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "digits_impl.h"

namespace msq {
namespace {

constexpr int64_t kWords = 16;   // of a block as codes; floats lie together in as many
constexpr int64_t kChunk = 512;  // rows whose inputs are held at a time
constexpr int64_t kDepth = 256;  // inputs whose weights are held as floats at a time

constexpr int64_t kHeld = 1 << 15;  // bytes of a panel that all rows meet before the next ones
constexpr int64_t kAhead = 2048;    // bytes of a panel that are asked for before they are needed

template <class S, class = void>
constexpr bool kOwnTile = false;
template <class S>
constexpr bool kOwnTile<S, std::void_t<decltype(&S::template tile<2, 8>)>> = true;

template <class S>
struct Linear {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int W = S::kWidth, V = S::kVectors, R = S::kRows;
  static constexpr int64_t kColumns = int64_t{W} * V;
  static constexpr int kTall = R / kDigits * kDigits;  // rows of digits
  static constexpr int64_t kDigitRows = 2 * kTall;     // up to which floats become digits
  static constexpr int kDirectRows = R < 4 ? R : 4;  // up to which weights are widened for each row

  static void float_block(void* job, int64_t block) {
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

  // --- integer sums

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
    constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;  // sums of their own hide what `dot` takes
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
  static void integer_rows(const Call& c, const uint8_t* panel, int64_t block, int64_t column,
                           int64_t begin, int64_t end, int32_t* sums) {
    const Params& p = c.p;
    const int32_t* in = c.codes + block * R * c.words;
    const int64_t groups = p.groups(), padded = p.padded();
    const int64_t whole = steps_of(p.inputs, BITS);
    const float* scale = p.floats(p.scale) + column;
    Sums<M> total;
    if (groups == 1 && !p.row_scale) {
      tile<M, BITS>(panel, in, begin, end, begin ? sums : nullptr, total);
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
      tile<M, BITS>(panel, in, g * length, (g + 1) * length, nullptr, total);
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
  static void integer_block(const Call& c, const uint8_t* panel, int64_t block, int64_t column,
                            int64_t begin, int64_t end, int32_t* sums) {
    if (c.rows_of(block) == M)
      return integer_rows<M, BITS>(c, panel, block, column, begin, end, sums);
    if constexpr (M > 1) integer_block<M - 1, BITS>(c, panel, block, column, begin, end, sums);
  }

  static void integer_panel(void* job, int64_t index) {
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
          integer_block<R, 8>(c, panel, block, column, begin, end, here);
        else
          integer_block<R, 4>(c, panel, block, column, begin, end, here);
      }
    }
  }

  // --- float inputs

  // A block of rows of digits.
  template <int M, int BITS>
  static void digit_rows(const Call& c, const uint8_t* panel, int64_t block, int64_t column) {
    const Params& p = c.p;
    const Segments segments(p);
    constexpr int N = 32 / BITS, T = M / kDigits;
    const int64_t first = block * c.tall / kDigits, padded = p.padded();
    const float *scale = p.floats(p.scale) + column, *zero = p.floats(p.zero_scale);
    const int32_t* in = c.codes + block * c.tall * c.words;
    F y[T][V];
    for (auto& row : y)
      for (auto& value : row) value = S::set1(0.0f);
    for (int64_t s = 0; s < segments.count; ++s) {
      const int64_t g = s / segments.parts * padded;
      Sums<M> total;
      tile<M, BITS>(panel, in, segments.begin(s) / N, (segments.end(s) + N - 1) / N, nullptr,
                    total);
      each<T>([&](auto t) __attribute__((always_inline)) {
        const int64_t at = (first + t) * segments.count + s;
        const int32_t* added = c.sums + kDigits * at;
        each<V>([&](auto v) __attribute__((always_inline)) {
          F sum = S::set1(0.0f);
          each<kDigits>([&](auto d) __attribute__((always_inline)) {
            const I digit = S::isub(total[kDigits * t + d][v], S::iset1(added[d]));
            sum = S::fma(sum, S::set1(1.0f / 256), S::to_float(digit));
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
  static void digit_block(const Call& c, const uint8_t* panel, int64_t block, int64_t column) {
    if (c.rows_of(block) == M) return digit_rows<M, BITS>(c, panel, block, column);
    if constexpr (M > kDigits) digit_block<M - kDigits, BITS>(c, panel, block, column);
  }

  static void digit_panel(void* job, int64_t index) {
    Call& c = *static_cast<Call*>(job);
    const int64_t column = index * kColumns;
    const uint8_t* panel = c.w.words() + index * steps_of(c.p.inputs, c.w.bits) * kColumns * 4;
    for (int64_t block = 0; block < c.blocks(); ++block)
      if (c.w.bits == 8)
        digit_block<kTall, 8>(c, panel, block, column);
      else
        digit_block<kTall, 4>(c, panel, block, column);
  }

  static void by_digits(const Weights& w, const Params& p, const float* x, int64_t rows, float* y,
                        int threads, bool* out_of_memory) {
    const Segments segments(p);
    const int64_t words = up_to(p.inputs, kBlock) / 4, parts = rows * segments.count;
    void* digits = scratch(0, up_to(rows * kDigits, kTall) * words * 4);
    void* scales = scratch(1, parts * 4);
    int32_t* sums = static_cast<int32_t*>(scratch(2, (kDigits + 1) * parts * 4));
    bool* odd = static_cast<bool*>(scratch(6, rows));
    if (!digits || !scales || !sums || !odd) {
      *out_of_memory = true;
      return;
    }
    float* float_sums = reinterpret_cast<float*>(sums + kDigits * parts);
    Call call = {w,       p,
                 x,       rows * kDigits,
                 y,       kTall,
                 words,   static_cast<int32_t*>(digits),
                 nullptr, static_cast<float*>(scales),
                 sums,    float_sums,
                 false,   odd};
    share_out(rows, threads, Digits<S>::split, &call);
    share_out((p.outputs + kColumns - 1) / kColumns, threads, digit_panel, &call);
    for (int64_t row = 0; row < rows; ++row)
      if (odd[row])
        by_vectors(w, p, x + row * p.inputs, 1, y + row * p.outputs, threads, out_of_memory);
  }

  // A few rows: each group's sums of inputs times codes, from the words themselves.
  template <int M, int BITS>
  static void direct_rows(const Call& c, const uint8_t* panel, int64_t column) {
    const Params& p = c.p;
    constexpr int N = 32 / BITS;  // inputs of a word
    constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;
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
  static void direct_block(const Call& c, const uint8_t* panel, int64_t column) {
    if (c.rows == M) return direct_rows<M, BITS>(c, panel, column);
    if constexpr (M > 1) direct_block<M - 1, BITS>(c, panel, column);
  }

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

  template <int M>
  static void float_rows(const float* in, const float* weights, int64_t depth, float* sums,
                         bool begun) {
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
  static void float_rows_of(int64_t count, const float* in, const float* weights, int64_t depth,
                            float* sums, bool begun) {
    if (count == M) return float_rows<M>(in, weights, depth, sums, begun);
    if constexpr (M > 1) float_rows_of<M - 1>(count, in, weights, depth, sums, begun);
  }

  static void float_panel(void* job, int64_t index) {
    Call& c = *static_cast<Call*>(job);
    const Params& p = c.p;
    const int64_t column = index * kColumns, n = c.words;
    const uint8_t* panel = c.w.words() + index * steps_of(p.inputs, c.w.bits) * kColumns * 4;
    if (c.rows <= kDirectRows) {
      if (c.w.bits == 8) return direct_block<kDirectRows, 8>(c, panel, column);
      return direct_block<kDirectRows, 4>(c, panel, column);
    }
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
        float_rows_of<R>(count, in, weights, end - begin, sums + block * R * kColumns, begin > 0);
      }
    }
    for (int64_t row = 0; row < c.rows; ++row)
      for (int v = 0; v < V && column + v * W < p.outputs; ++v) {
        const int64_t at = column + v * W;
        put(c, row, at, with_bias(p, at, S::load(sums + row * kColumns + v * W)));
      }
  }

  // --- the call

  // Static scales say nothing of NaN in a row.
  static void keep_nan(const Call& c) {
    for (int64_t row = 0; row < c.rows; ++row)
      for (int64_t k = 0; c.scales[row] != c.scales[row] && k < c.p.outputs; ++k)
        c.y[row * c.p.outputs + k] = c.scales[row];
  }

  static void linear(const Weights& w, const Params& p, const float* x, int64_t rows, float* y,
                     int threads, bool* out_of_memory) {
    if constexpr (S::kByDigits)
      if (p.input == MSQ_FLOAT && rows <= kDigitRows)
        return by_digits(w, p, x, rows, y, threads, out_of_memory);
    by_vectors(w, p, x, rows, y, threads, out_of_memory);
  }

  static void by_vectors(const Weights& w, const Params& p, const float* x, int64_t rows, float* y,
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
        share_out(call.blocks(), threads, float_block, &call);
      if (!call.failed) share_out(panels, threads, integer ? integer_panel : float_panel, &call);
      *out_of_memory |= call.failed;
      if (p.input == MSQ_STATIC) keep_nan(call);
    }
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_LINEAR_IMPL_H_
