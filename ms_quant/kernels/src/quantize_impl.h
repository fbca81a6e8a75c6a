// Inputs become integer codes: a row at a time, in blocks of 64 inputs.
//
// A code is round(x / scale + offset), limited, with IEEE division: the reference's, bit for bit.
// Division is slow, so a block is multiplied by the reciprocal instead. Where that lands within
// 0.0002 of the middle of two codes the nearest integer of the quotient might be the other one, and
// the block is divided. A row whose scale comes from itself is read twice: for its largest
// magnitude, then for its codes. A panel's codes may have something added to them (S::kBias,
// kBias4), which adds that times the sum of the input's codes to each output: those sums are kept
// for each group, to be subtracted.

#ifndef MS_QUANT_QUANTIZE_IMPL_H_
#define MS_QUANT_QUANTIZE_IMPL_H_

#include <stdint.h>
#include <string.h>

#include "linear_call.h"
#include "pool.h"

namespace msq {
namespace {

template <class S>
struct Quantize {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int W = S::kWidth;

  static constexpr int kParts = kBlock / W;  // vectors of a block of inputs

  // What a block of inputs is divided by, its reciprocal, and what else makes codes of it. Of
  // static inputs that are only multiplied there is no scale.
  struct Steps {
    const float *mul, *scale, *inverse;  // of each input, or null
    F all_scale, all_inverse, offset, low, high;
  };

  // The codes of a block of inputs, x / scale + offset rounded and limited. The product with the
  // reciprocal has the same nearest integer unless it lies close to the middle of two; if one of a
  // block does, the block is divided. `k` is the index of its first input.
  template <bool EACH, bool LIMITED>
  static void block_codes(const Steps& s, const float* x, int64_t k, int8_t* codes) {
    F v[kParts], whole[kParts], part = S::set1(0.0f);
    each<kParts>([&](auto i) __attribute__((always_inline)) {
      v[i] = S::load(x + i * W);
      if (s.mul) v[i] = S::mul(v[i], S::load(s.mul + k + i * W));
      F quick;
      if constexpr (EACH)
        quick = S::add(S::mul(v[i], S::load(s.inverse + k + i * W)), s.offset);
      else
        quick = S::mul(v[i], s.all_inverse);
      whole[i] = S::round(quick);
      part = S::max(part, S::abs(S::sub(quick, whole[i])));
    });
    if ((!EACH || s.scale) && S::near_half(part)) {
      each<kParts>([&](auto i) __attribute__((always_inline)) {
        const F scale = EACH ? S::load(s.scale + k + i * W) : s.all_scale;
        const F quotient = S::div(v[i], scale);
        whole[i] = S::round(EACH ? S::add(quotient, s.offset) : quotient);
      });
    }
    if constexpr (LIMITED)
      each<kParts>([&](auto i) __attribute__((always_inline)) {
        whole[i] = S::max(S::min(whole[i], s.high), s.low);
      });
    S::store_codes(codes, whole);
  }

  // The codes of a row, a block to each `stride` bytes; those beyond its end are undefined.
  template <bool EACH, bool LIMITED>
  static void row_codes(const Steps& s, const float* x, int64_t n, int8_t* codes, int64_t stride) {
    int64_t k = 0;
    for (; k + kBlock <= n; k += kBlock, codes += stride)
      block_codes<EACH, LIMITED>(s, x + k, k, codes);
    if (k == n) return;
    alignas(64) float last[kBlock] = {};
    for (int64_t i = k; i < n; ++i) last[i - k] = x[i];
    block_codes<EACH, LIMITED>(s, last, k, codes);
  }

  static bool has_nan(const float* x, int64_t n) {
    bool found = false;
    int64_t k = 0;
    for (; k + W <= n; k += W) found |= S::any_nan(S::load(x + k));
    for (; k < n; ++k) found |= x[k] != x[k];
    return found;
  }

  // What a row is divided by; NaN if something in it is.
  static float row_scale(const float* x, const float* mul, int64_t n, float largest, float clip) {
    F parts[4];
    each<4>([&](auto i) __attribute__((always_inline)) { parts[i] = S::set1(0.0f); });
    int64_t k = 0;
    for (; k + 4 * W <= n; k += 4 * W)
      each<4>([&](auto i) __attribute__((always_inline)) {
        F v = S::load(x + k + i * W);
        if (mul) v = S::mul(v, S::load(mul + k + i * W));
        parts[i] = S::max(parts[i], S::abs(v));
      });
    float most = S::highest(S::max(S::max(parts[0], parts[1]), S::max(parts[2], parts[3])));
    if (has_nan(x, n)) return __builtin_nanf("");  // which a maximum may pass over
    for (; k < n; ++k) {
      const float v = mul ? x[k] * mul[k] : x[k], size = v < 0 ? -v : v;
      most = size > most ? size : most;
    }
    return scale_of(most, largest, clip);
  }

  // NaN stays NaN.
  static float scale_of(float most, float largest, float clip) {
    const float scale = most * clip / largest;
    return scale < 1.17549435e-38f ? 1.0f : scale;
  }

  static Steps steps_per_token(const float* mul, float scale, float low, float high) {
    return {mul,        nullptr,      nullptr,      S::set1(scale), S::set1(1.0f / scale),
            S::set1(0), S::set1(low), S::set1(high)};
  }

  // Codes within -128..127 are limited by the conversion, if the quotients surely fit 32 bits.
  static bool is_limited(float low, float high, float clip) {
    return low != -128.0f || high != 127.0f || clip != 1.0f;
  }

  static int32_t sum_of(const int8_t* codes, int64_t count) {
    int32_t sum = 0;
    if (count == kBlock) {
      I sums = S::izero();
      for (int64_t k = 0; k < kBlock; k += 4 * W)
        S::dot(sums, S::codes(S::iset1(0x01010101)), S::four_each(S::iload(codes + k)));
      return S::total(sums);
    }
    for (int64_t k = 0; k < count; ++k) sum += codes[k];
    return sum;
  }

  static void static_codes(const Params& p, const float* x, int8_t* out, int64_t stride) {
    const F one = S::set1(1.0f);
    const Steps steps = {p.floats(p.mul),
                         p.floats(p.input_scale),
                         p.floats(p.input_inverse),
                         one,
                         one,
                         S::set1(p.offset),
                         S::set1(static_cast<float>(p.smallest)),
                         S::set1(static_cast<float>(p.largest))};
    row_codes<true, true>(steps, x, p.inputs, out, stride);
  }

  static float token_codes(const Params& p, const float* x, int8_t* out, int64_t stride) {
    const float low = static_cast<float>(p.smallest), high = static_cast<float>(p.largest);
    const float* mul = p.floats(p.mul);
    const float scale = row_scale(x, mul, p.inputs, high, p.clip);
    const Steps steps = steps_per_token(mul, scale, low, high);
    if (is_limited(low, high, p.clip))
      row_codes<false, true>(steps, x, p.inputs, out, stride);
    else
      row_codes<false, false>(steps, x, p.inputs, out, stride);
    return scale;
  }

  // The sum of a group's codes.
  static int32_t group_sum(const int8_t* codes, int64_t stride, int64_t begin, int64_t end) {
    int32_t sum = 0;
    for (int64_t k = begin; k < end;) {
      const int64_t from = k % kBlock, length = at_most(kBlock - from, end - k);
      sum += sum_of(codes + k / kBlock * stride + from, length);
      k += length;
    }
    return sum;
  }

  // The codes of one row of a call, its scale, and its sums.
  static void quantize(void* job, int64_t row) {
    Call& c = *static_cast<Call*>(job);
    const Params& p = c.p;
    const int64_t n = p.inputs, block = row / c.tall, stride = c.rows_of(block) * kBlock;
    const float* x = c.x + row * n;
    int8_t* out =
        reinterpret_cast<int8_t*>(c.codes + block * c.tall * c.words) + row % c.tall * kBlock;
    if (p.input == MSQ_PER_TOKEN) {
      c.scales[row] = token_codes(p, x, out, stride);
    } else {
      static_codes(p, x, out, stride);
      c.scales[row] = has_nan(x, n) ? __builtin_nanf("") : 1.0f;
    }
    for (int64_t k = n % kBlock; k && k < kBlock; ++k) out[n / kBlock * stride + k] = 0;
    const int32_t added = c.w.bits == 8 ? S::kBias : kBias4;
    for (int64_t g = 0; g < p.groups(); ++g)
      c.sums[row * p.groups() + g] =
          added ? added * group_sum(out, stride, g * p.group, (g + 1) * p.group) : 0;
  }

  struct Rows {
    const float* x;
    int64_t columns;
    float smallest, largest, clip;
    int32_t cleared;
    int8_t* codes;
    float* scales;
  };

  // The next number whose last bits are 0, of a positive one; NaN stays NaN.
  static float rounded_up(float x, int32_t cleared) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t last = (1u << cleared) - 1;
    bits = (bits + last) & ~last;
    memcpy(&x, &bits, sizeof bits);
    return x;
  }

  static void quantize_row(void* job, int64_t row) {
    const Rows& c = *static_cast<Rows*>(job);
    const float* x = c.x + row * c.columns;
    c.scales[row] = rounded_up(row_scale(x, nullptr, c.columns, c.largest, c.clip), c.cleared);
    const Steps steps = steps_per_token(nullptr, c.scales[row], c.smallest, c.largest);
    const int64_t whole = c.columns / kBlock * kBlock;
    int8_t* out = c.codes + row * c.columns;
    row_codes<false, true>(steps, x, whole, out, kBlock);
    int8_t last[kBlock];
    row_codes<false, true>(steps, x + whole, c.columns - whole, last, kBlock);
    for (int64_t k = whole; k < c.columns; ++k) out[k] = last[k - whole];
  }

  static void quantize_rows(const float* x, int64_t rows, int64_t columns, float smallest,
                            float largest, float clip, int32_t cleared, int8_t* codes,
                            float* scales, int threads) {
    Rows call = {x, columns, smallest, largest, clip, cleared, codes, scales};
    share_out(rows, threads, quantize_row, &call);
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_QUANTIZE_IMPL_H_
