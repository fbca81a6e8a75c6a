// Byte-split fixed point: a row of floats becomes four rows of bytes and a few powers of two.
//
// The inputs of a segment, at most 512 of one group, are rounded to integers below 2^30 times one
// power of two, which the largest of them decides: fixed point. An integer is four bytes with
// signs, n = b0 + 256 b1 + 256^2 b2 + 256^3 b3, and each byte has a row of its own among the codes
// of a call, the lowest first. So a product of floats and codes is four exact products of bytes, as
// in Ozaki's scheme (Ootomo, Ozaki and Yokota, "DGEMM on Integer Matrix Multiplication Unit",
// arXiv:2306.11975), which splits matrices of doubles in this way. A sum of 512 products of bytes
// is below 2^24, so it is a float exactly. A row is not split if it has NaN, an infinity or a
// segment whose largest magnitude is below 2^-80 but not 0: the factor that makes integers of it
// would come close to the end of float32's range.

#ifndef MS_QUANT_BYTE_SPLIT_IMPL_H_
#define MS_QUANT_BYTE_SPLIT_IMPL_H_

#include "quantize_impl.h"

namespace msq {
namespace {

constexpr int kSplit = 4;          // bytes of an input
constexpr int64_t kSegment = 512;  // inputs at most: sums of products of bytes are exact in float32

struct Segments {
  int64_t group, parts, count;  // inputs and segments of a group; segments of all inputs

  explicit Segments(const Params& p)
      : group(p.group), parts((p.group + kSegment - 1) / kSegment), count(p.groups() * parts) {}
  int64_t begin(int64_t s) const { return s / parts * group + s % parts * kSegment; }
  int64_t end(int64_t s) const { return at_most(begin(s) + kSegment, (s / parts + 1) * group); }
};

template <class S>
struct ByteSplit {
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

  // The power of two that takes inputs of magnitudes up to `most` below 2^30; 0 if there is none.
  static float factor(float most) {
    if (most == 0.0f) return 1.0f;
    if (!(most >= 0x1p-80f)) return 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &most, 4);
    return of_bits((2 * 127 + 29 - (bits >> 23)) << 23);
  }

  // The bytes of inputs [k, k + kBlock) of a row.
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
    S::store_bytes(out, v);
  }

  // The sum of a segment's integers; `added` gets what a weight's bias adds to each row of bytes.
  static float sums(const Call& c, const int8_t* bytes, int64_t stride, int64_t begin, int64_t end,
                    int32_t* added) {
    const int32_t bias = c.w.bits == 8 ? S::kBias : kBias4;
    double all = 0;
    for (int b = 0; b < kSplit; ++b) {
      const int32_t sum = Quantize<S>::group_sum(bytes + b * kBlock, stride, begin, end);
      added[b] = bias * sum;
      all = all / 256 + sum;
    }
    return static_cast<float>(all);
  }

  // Splits one row of a call. Afterwards `scales` holds what the upper byte of each segment's
  // integers is a multiple of, and `sums` and `float_sums` hold its sums.
  static void split(void* job, int64_t row) {
    Call& c = *static_cast<Call*>(job);
    const Segments segments(c.p);
    const float *x = c.x + row * c.p.inputs, *mul = c.p.floats(c.p.mul);
    const int64_t each_row = c.tall / kSplit, block_of = row / each_row;
    const int64_t stride = c.rows_of(block_of) * kBlock;
    int8_t* out = reinterpret_cast<int8_t*>(c.codes + block_of * c.tall * c.words) +
                  row % each_row * kSplit * kBlock;
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
          sums(c, out, stride, segments.begin(s), segments.end(s), c.sums + kSplit * at);
      factors[s] = 0x1p24f / factors[s];
    }
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_BYTE_SPLIT_IMPL_H_
