// The vectors that AVX2 with and without VNNI have in common; see vectors.h.

#ifndef MS_QUANT_X86_256_H_
#define MS_QUANT_X86_256_H_

#include <immintrin.h>
#include <stdint.h>

namespace msq {
namespace {

struct X86Of256 {
  static constexpr int kWidth = 8, kVectors = 2, kFloatRows = 6;
  using F = __m256;
  using I = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_bfloat16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F at_least(F a, float limit) { return _mm256_max_ps(set1(limit), a); }
  static F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static bool any_nan(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
  static F ldexp(F a, F n) {  // n within -126 and 127
    const I exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static F zero_below(F a, F x, float limit) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(limit), _CMP_LT_OQ), a);
  }
  static float highest(F a) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }
  static bool near_half(F part) {
    return _mm256_movemask_ps(_mm256_cmp_ps(abs(part), set1(0.4998f), _CMP_GT_OQ)) != 0;
  }

  static I iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void istore(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static I izero() { return _mm256_setzero_si256(); }
  static I iset1(int32_t x) { return _mm256_set1_epi32(x); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static int32_t total(I a) {
    __m128i v = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    v = _mm_add_epi32(v, _mm_unpackhi_epi64(v, v));
    return _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_srli_epi64(v, 32)));
  }
  static I four(const F* v) {  // packing works within halves, so words come out of order
    const I low = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
    const I high = _mm256_packs_epi32(_mm256_cvtps_epi32(v[2]), _mm256_cvtps_epi32(v[3]));
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  }
  static void store_codes(int8_t* p, const F (&v)[8]) {
    istore(p, four(v));
    istore(p + 32, four(v + 4));
  }

  static I right(I a, int by) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(by)); }
  static I low_halves(I a) { return _mm256_and_si256(a, iset1(0x0f0f0f0f)); }
  static I high_halves(I a) { return low_halves(_mm256_srli_epi32(a, 4)); }
  static F half(I a, int k) {
    const I code = _mm256_and_si256(right(a, k < 4 ? 8 * k : 8 * (k - 4) + 4), iset1(15));
    return sub(to_float(code), set1(8.0f));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_X86_256_H_
