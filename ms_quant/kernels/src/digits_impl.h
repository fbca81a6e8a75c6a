// Inputs as integers, for products of floats with codes that are products of bytes; see
// linear_impl.h.
//
// The inputs of a segment are integers below 2^30 times a power of two, an integer four bytes with
// a sign, its digits. Each digit has a row of its own among the codes of a call, the lowest first.

#ifndef MS_QUANT_DIGITS_IMPL_H_
#define MS_QUANT_DIGITS_IMPL_H_

#include "quantize_impl.h"

namespace msq {
namespace {

constexpr int kDigits = 4;
constexpr int64_t kSegment = 512;  // inputs at most: sums of a digit are exact in float32

struct Segments {
  int64_t group, parts, count;  // inputs and segments of a group; segments of all inputs

  explicit Segments(const Params& p)
      : group(p.group), parts((p.group + kSegment - 1) / kSegment), count(p.groups() * parts) {}
  int64_t begin(int64_t s) const { return s / parts * group + s % parts * kSegment; }
  int64_t end(int64_t s) const { return at_most(begin(s) + kSegment, (s / parts + 1) * group); }
};

template <class S>
struct Digits {
  using F = typename S::F;
  static constexpr int W = S::kWidth, kParts = kBlock / W;

  static float of_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }

  // The largest magnitude; NaN if there is NaN or an infinity.
  static float largest(const float* x, const float* mul, int64_t n) {
    F most = S::set1(0.0f), odd = S::set1(0.0f);
    int64_t k = 0;
    for (; k + W <= n; k += W) {
      F v = S::load(x + k);
      if (mul) v = S::mul(v, S::load(mul + k));
      most = S::max(most, S::abs(v));
      odd = S::add(odd, S::sub(v, v));
    }
    float found = S::highest(most), rest = S::any_nan(odd) ? __builtin_nanf("") : 0.0f;
    for (; k < n; ++k) {
      const float v = mul ? x[k] * mul[k] : x[k], size = v < 0 ? -v : v;
      found = size > found ? size : found;
      rest += v - v;
    }
    return found + rest;
  }

  // What takes inputs up to some magnitude below 2^30, a power of two; 0 if there is none.
  static float factor(float most) {
    if (most == 0.0f) return 1.0f;
    if (!(most >= 0x1p-80f)) return 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &most, 4);
    return of_bits((2 * 127 + 29 - (bits >> 23)) << 23);
  }

  // Digits of inputs [k, k + kBlock) of a row.
  static void block(const Call& c, const float* x, const float* factors, int64_t k, int8_t* out) {
    const float* mul = c.p.floats(c.p.mul);
    const Segments segments(c.p);
    const int64_t n = c.p.inputs, left = n - k;
    F v[kParts];
    if (left >= kBlock && (segments.count == 1 || c.p.group % kBlock == 0)) {
      const F by = S::set1(factors[k / c.p.group * segments.parts + k % c.p.group / kSegment]);
      each<kParts>([&](auto i) __attribute__((always_inline)) {
        v[i] = S::load(x + k + i * W);
        if (mul) v[i] = S::mul(v[i], S::load(mul + k + i * W));
        v[i] = S::mul(v[i], by);
      });
    } else {
      alignas(64) float some[kBlock] = {};
      for (int64_t i = k; i < k + kBlock && i < n; ++i)
        some[i - k] = (mul ? x[i] * mul[i] : x[i]) *
                      factors[i / c.p.group * segments.parts + i % c.p.group / kSegment];
      each<kParts>([&](auto i) __attribute__((always_inline)) { v[i] = S::load(some + i * W); });
    }
    S::store_digits(out, v);
  }

  // The sum of a segment's integers, and of each digit what a weight's bias adds.
  static float sums(const Call& c, const int8_t* digits, int64_t stride, int64_t begin, int64_t end,
                    int32_t* added) {
    const int32_t bias = c.w.bits == 8 ? S::kBias : kBias4;
    double all = 0;
    for (int d = 0; d < kDigits; ++d) {
      const int32_t sum = Quantize<S>::group_sum(digits + d * kBlock, stride, begin, end);
      added[d] = bias * sum;
      all = all / 256 + sum;
    }
    return static_cast<float>(all);
  }

  // One row of a call: of each segment what its integers are times, and its sums.
  static void split(void* job, int64_t row) {
    Call& c = *static_cast<Call*>(job);
    const Segments segments(c.p);
    const float *x = c.x + row * c.p.inputs, *mul = c.p.floats(c.p.mul);
    const int64_t each_row = c.tall / kDigits, block_of = row / each_row;
    const int64_t stride = c.rows_of(block_of) * kBlock;
    int8_t* out = reinterpret_cast<int8_t*>(c.codes + block_of * c.tall * c.words) +
                  row % each_row * kDigits * kBlock;
    c.odd[row] = false;
    float* factors = c.scales + row * segments.count;
    for (int64_t s = 0; s < segments.count; ++s) {
      const int64_t begin = segments.begin(s), size = segments.end(s) - begin;
      factors[s] = factor(largest(x + begin, mul ? mul + begin : nullptr, size));
      if (factors[s] == 0.0f) {
        c.odd[row] = true;
        return;
      }
    }
    for (int64_t k = 0; k < c.p.inputs; k += kBlock)
      block(c, x, factors, k, out + k / kBlock * stride);
    for (int64_t s = 0; s < segments.count; ++s) {
      const int64_t at = row * segments.count + s;
      c.float_sums[at] =
          sums(c, out, stride, segments.begin(s), segments.end(s), c.sums + kDigits * at);
      factors[s] = 0x1p24f / factors[s];
    }
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_DIGITS_IMPL_H_
