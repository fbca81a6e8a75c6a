// What a decoder block does between its linears: RMSNorm, the gate of the MLP, rotary positions and
// softmax.
//
// All go through rows a vector of kWidth numbers at a time, the last of a row filled up. Threads
// take pieces of about 2^14 numbers, or a row where that is longer; of rotary positions a
// token.

#ifndef MS_QUANT_BLOCK_IMPL_H_
#define MS_QUANT_BLOCK_IMPL_H_

#include "column_stats.h"
#include "linear_call.h"
#include "pool.h"

namespace msq {
namespace {

template <class S>
struct BlockOps {
  using F = typename S::F;
  static constexpr int W = S::kWidth;
  static constexpr int64_t kPiece = 1 << 14;  // numbers of one piece of a job

  // e^x = 2^n e^r with the polynomial of Cephes' expf, within 2 units in the last place. It is 0
  // below -80, where products would become subnormal, which takes processors a hundred times as
  // long, and NaN for NaN and infinities.
  static F exp(F x) {
    const F inside = S::max(S::min(x, S::set1(88.0f)), S::set1(-88.0f));
    const F n = S::round(S::mul(inside, S::set1(1.44269504f)));
    F r = S::fma(n, S::set1(-0.693359375f), inside);
    r = S::fma(n, S::set1(2.12194440e-4f), r);
    F p = S::set1(1.9875691500e-4f);
    p = S::fma(p, r, S::set1(1.3981999507e-3f));
    p = S::fma(p, r, S::set1(8.3334519073e-3f));
    p = S::fma(p, r, S::set1(4.1665795894e-2f));
    p = S::fma(p, r, S::set1(1.6666665459e-1f));
    p = S::fma(p, r, S::set1(5.0000001201e-1f));
    p = S::fma(S::mul(p, r), r, S::add(r, S::set1(1.0f)));
    return S::add(S::zero_below(S::ldexp(p, n), x, -80.0f), S::sub(x, x));
  }

  static F part_of(const float* x, int64_t count, float rest) {
    if (count >= W) return S::load(x);
    alignas(64) float part[W];
    for (int64_t i = 0; i < W; ++i) part[i] = i < count ? x[i] : rest;
    return S::load(part);
  }

  static void put_part(float* y, F v, int64_t count) {
    if (count >= W) return S::store(y, v);
    alignas(64) float part[W];
    S::store(part, v);
    for (int64_t i = 0; i < count; ++i) y[i] = part[i];
  }

  static float sum_of(F v) {
    alignas(64) float part[W];
    S::store(part, v);
    float sum = 0;
    for (float x : part) sum += x;
    return sum;
  }

  struct Norm {
    const float *x, *weight;
    int64_t rows, size;
    float eps;
    float* y;
  };

  static void norm_piece(void* job, int64_t index) {
    const Norm& c = *static_cast<Norm*>(job);
    const int64_t each = c.size < kPiece ? kPiece / c.size : 1;
    for (int64_t row = index * each; row < at_most(c.rows, (index + 1) * each); ++row) {
      const float* x = c.x + row * c.size;
      F squares = S::set1(0.0f);
      for (int64_t k = 0; k < c.size; k += W) {
        const F v = part_of(x + k, c.size - k, 0);
        squares = S::fma(v, v, squares);
      }
      const float mean = sum_of(squares) / static_cast<float>(c.size) + c.eps;
      const F by = S::set1(1.0f / __builtin_sqrtf(mean));
      for (int64_t k = 0; k < c.size; k += W) {
        const F v = S::mul(part_of(x + k, c.size - k, 0), by);
        put_part(c.y + row * c.size + k, S::mul(v, part_of(c.weight + k, c.size - k, 0)),
                 c.size - k);
      }
    }
  }

  static void rms_norm(const float* x, const float* weight, int64_t rows, int64_t size, float eps,
                       float* y, int threads) {
    Norm job = {x, weight, rows, size, eps, y};
    const int64_t each = size < kPiece ? kPiece / size : 1;
    share_out((rows + each - 1) / each, threads, norm_piece, &job);
  }

  struct Gate {
    const float *gate, *up;
    int64_t count;
    float* y;
  };

  static void gate_piece(void* job, int64_t index) {
    const Gate& c = *static_cast<Gate*>(job);
    const int64_t end = at_most(c.count, (index + 1) * kPiece);
    const F one = S::set1(1.0f), none = S::set1(0.0f);
    for (int64_t k = index * kPiece; k < end; k += W) {
      const F g = part_of(c.gate + k, end - k, 0);
      // e^g / (1 + e^g) below 0 and 1 / (1 + e^-g) above: no power is larger than 1.
      const F power = exp(S::sub(none, S::abs(g)));
      const F above = S::add(S::zero_below(S::sub(one, power), g, 0.0f), power);
      const F sigmoid = S::div(above, S::add(one, power));
      const F y = S::mul(S::mul(g, sigmoid), part_of(c.up + k, end - k, 0));
      put_part(c.y + k, y, end - k);
    }
  }

  // gate / (1 + e^-gate) * up
  static void swiglu(const float* gate, const float* up, int64_t count, float* y, int threads) {
    Gate job = {gate, up, count, y};
    share_out((count + kPiece - 1) / kPiece, threads, gate_piece, &job);
  }

  struct Rope {
    const float *x, *cos, *sin;
    int64_t batch, length, heads, size;
    float* y;
  };

  static void rope_piece(void* job, int64_t index) {  // one token
    const Rope& c = *static_cast<Rope*>(job);
    const int64_t b = index / c.length, s = index % c.length, half = c.size / 2;
    const float *cos = c.cos + s * c.size, *sin = c.sin + s * c.size;
    for (int64_t h = 0; h < c.heads; ++h) {
      const float* x = c.x + (index * c.heads + h) * c.size;
      float* y = c.y + ((b * c.heads + h) * c.length + s) * c.size;
      for (int64_t k = 0; k < half; k += W) {
        const int64_t left = half - k;
        const F low = part_of(x + k, left, 0), high = part_of(x + half + k, left, 0);
        const F turned = S::mul(low, part_of(sin + half + k, left, 0));
        put_part(
            y + k,
            S::sub(S::mul(low, part_of(cos + k, left, 0)), S::mul(high, part_of(sin + k, left, 0))),
            left);
        put_part(y + half + k, S::add(S::mul(high, part_of(cos + half + k, left, 0)), turned),
                 left);
      }
    }
  }

  // (batch, length, heads, size) to (batch, heads, length, size), turned by (length, size) angles.
  static void rope(const float* x, const float* cos, const float* sin, int64_t batch,
                   int64_t length, int64_t heads, int64_t size, float* y, int threads) {
    Rope job = {x, cos, sin, batch, length, heads, size, y};
    share_out(batch * length, threads, rope_piece, &job);
  }

  struct Softmax {
    float* x;
    const float* mask;
    int64_t rows, columns, length, rows_of_mask;
    float scale;
  };

  // Computes x * scale + mask in place and returns the largest.
  static float masked(float* x, const float* mask, int64_t n, float factor) {
    const F scale = S::set1(factor);
    F most = S::set1(-3.0e38f);
    for (int64_t k = 0; k < n; k += W) {
      const F v = S::add(S::mul(part_of(x + k, n - k, 0), scale), part_of(mask + k, n - k, -3e38f));
      put_part(x + k, v, n - k);
      most = S::max(most, v);
    }
    return S::highest(most);
  }

  // Writes e^(x - top), 16 numbers to each `stride`, and returns their sum. y may be x.
  static float powers(const float* x, int64_t n, float top, float* y, int64_t stride) {
    const F highest = S::set1(top);
    F total = S::set1(0.0f);
    int64_t k = 0;
    for (; k + W <= n; k += W) {
      const F v = exp(S::sub(S::load(x + k), highest));
      S::store(y + k / kWords * stride + k % kWords, v);
      total = S::add(total, v);
    }
    if (k == n) return sum_of(total);
    alignas(64) float part[W];
    S::store(part, exp(S::sub(part_of(x + k, n - k, -3e38f), highest)));
    for (int64_t i = n - k; i < W; ++i) part[i] = 0;
    put_part(y + k / kWords * stride + k % kWords, S::load(part), n - k);
    return sum_of(S::add(total, S::load(part)));
  }

  static void softmax_piece(void* job, int64_t index) {
    const Softmax& c = *static_cast<Softmax*>(job);
    const int64_t n = c.columns, each = n < kPiece ? kPiece / n : 1;
    for (int64_t row = index * each; row < at_most(c.rows, (index + 1) * each); ++row) {
      float* x = c.x + row * n;
      const float* mask = c.mask + (row / c.rows_of_mask * c.length + row % c.length) * n;
      const F by = S::set1(1.0f / powers(x, n, masked(x, mask, n, c.scale), x, kWords));
      for (int64_t k = 0; k < n; k += W)
        put_part(x + k, S::mul(part_of(x + k, n - k, 0), by), n - k);
    }
  }

  // In place, of x * scale + mask; row r has row r / rows_of_mask, r % length of the mask.
  static void softmax(float* x, const float* mask, int64_t rows, int64_t columns, int64_t length,
                      int64_t rows_of_mask, float scale, int threads) {
    Softmax job = {x, mask, rows, columns, length, rows_of_mask, scale};
    const int64_t each = columns < kPiece ? kPiece / columns : 1;
    share_out((rows + each - 1) / each, threads, softmax_piece, &job);
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_BLOCK_IMPL_H_
