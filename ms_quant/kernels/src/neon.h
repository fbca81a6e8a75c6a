// The vectors of NEON with dot products, which NEON with matrix products has too; see vectors.h.

#ifndef MS_QUANT_NEON_H_
#define MS_QUANT_NEON_H_

#include <arm_neon.h>
#include <stdint.h>

namespace msq {
namespace {

struct NeonDot {
  static constexpr int kWidth = 4, kVectors = 4, kRows = 6, kFloatRows = 6;
  static constexpr int32_t kBias = 0;
  static constexpr bool kByteSplit = true;
  using F = float32x4_t;
  using I = int32x4_t;
  using Codes = int8x16_t;
  using Inputs = int8x16_t;

  static F load(const float* p) { return vld1q_f32(p); }
  static F load_bfloat16(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F set1(float x) { return vdupq_n_f32(x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxnmq_f32(a, b); }
  static F min(F a, F b) { return vminnmq_f32(a, b); }
  static F at_least(F a, float limit) { return vmaxq_f32(a, set1(limit)); }
  static F abs(F a) { return vabsq_f32(a); }
  static F round(F a) { return vrndnq_f32(a); }
  static bool any_nan(F a) { return vminvq_u32(vceqq_f32(a, a)) == 0; }
  static F ldexp(F a, F n) {  // n within -126 and 127
    const I exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    return mul(a, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  static F zero_below(F a, F x, float limit) {
    const uint32x4_t below = vcltq_f32(x, set1(limit));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), below));
  }
  static float highest(F a) { return vmaxnmvq_f32(a); }
  static bool near_half(F part) { return highest(abs(part)) > 0.4998f; }

  static I iload(const void* p) { return vld1q_s32(static_cast<const int32_t*>(p)); }
  static void istore(void* p, I v) { vst1q_s32(static_cast<int32_t*>(p), v); }
  static I izero() { return vdupq_n_s32(0); }
  static I iset1(int32_t x) { return vdupq_n_s32(x); }
  static I iadd(I a, I b) { return vaddq_s32(a, b); }
  static I isub(I a, I b) { return vsubq_s32(a, b); }
  static I ixor(I a, I b) { return veorq_s32(a, b); }
  static F to_float(I a) { return vcvtq_f32_s32(a); }
  static int32_t total(I a) { return vaddvq_s32(a); }
  static int16x8_t two(const F* v) {
    return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(v[0])), vqmovn_s32(vcvtnq_s32_f32(v[1])));
  }
  static void store_codes(int8_t* p, const F (&v)[16]) {
    for (int i = 0; i < 16; i += 4)
      vst1q_s8(p + 4 * i, vcombine_s8(vqmovn_s16(two(v + i)), vqmovn_s16(two(v + i + 2))));
  }

  static void store_bytes(int8_t* p, const F (&v)[16]) {
    const I carry = iset1(0x00808080);
    for (int i = 0; i < 16; i += 4, p += 16) {
      int32_t words[16];
      for (int j = 0; j < 4; ++j)
        istore(words + 4 * j, veorq_s32(vaddq_s32(vcvtnq_s32_f32(v[i + j]), carry), carry));
      const int8x16x4_t rows = vld4q_s8(reinterpret_cast<const int8_t*>(words));
      for (int d = 0; d < 4; ++d) vst1q_s8(p + 64 * d, rows.val[d]);
    }
  }

  static I low_halves(I a) { return vandq_s32(a, iset1(0x0f0f0f0f)); }
  static I high_halves(I a) {
    return low_halves(vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), 4)));
  }
  static F byte(I a, int k) {
    return to_float(vshlq_s32(vshlq_s32(a, iset1(24 - 8 * k)), iset1(-24)));
  }
  static F half(I a, int k) {
    const int by = k < 4 ? 8 * k : 8 * (k - 4) + 4;
    const I code = vandq_s32(vshlq_s32(a, iset1(-by)), iset1(15));
    return sub(to_float(code), set1(8.0f));
  }

  static Codes codes(I words) { return vreinterpretq_s8_s32(words); }
  static Inputs inputs(const int32_t* p) { return vreinterpretq_s8_s32(vld1q_dup_s32(p)); }
  static Inputs four_each(I words) { return codes(words); }
  static void dot(I& sum, Codes c, Inputs x) { sum = vdotq_s32(sum, c, x); }
  static void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_NEON_H_
