// The vectors of AVX-512 with VNNI; see vectors.h.

#ifndef MS_QUANT_AVX512_H_
#define MS_QUANT_AVX512_H_

#include <immintrin.h>
#include <stdint.h>

namespace msq {
namespace {

struct Avx512Vnni {
  static constexpr int kWidth = 16, kVectors = 2, kRows = 12, kFloatRows = 12;
  static constexpr int32_t kBias = 128;
  static constexpr bool kByteSplit = true;
  using F = __m512;
  using I = __m512i;
  using Codes = __m512i;
  using Inputs = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_bfloat16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F at_least(F a, float limit) { return _mm512_max_ps(set1(limit), a); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, 8); }
  static bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
  static F ldexp(F a, F n) { return _mm512_scalef_ps(a, n); }
  static F zero_below(F a, F x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(limit), _CMP_NLT_UQ), a);
  }
  static float highest(F a) { return _mm512_reduce_max_ps(a); }
  static bool near_half(F part) {
    return _mm512_cmp_ps_mask(abs(part), set1(0.4998f), _CMP_GT_OQ) != 0;
  }

  static I iload(const void* p) { return _mm512_loadu_si512(p); }
  static void istore(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I izero() { return _mm512_setzero_si512(); }
  static I iset1(int32_t x) { return _mm512_set1_epi32(x); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static int32_t total(I a) { return _mm512_reduce_add_epi32(a); }
  static void store_codes(int8_t* p, const F (&v)[4]) {  // packing works within quarters
    const I low = _mm512_packs_epi32(_mm512_cvtps_epi32(v[0]), _mm512_cvtps_epi32(v[1]));
    const I high = _mm512_packs_epi32(_mm512_cvtps_epi32(v[2]), _mm512_cvtps_epi32(v[3]));
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    istore(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
  }

  static void store_bytes(int8_t* p, const F (&v)[4]) {
    const I gather = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = 0; i < 4; ++i, p += 16) {
      const I sums = iadd(_mm512_cvtps_epi32(v[i]), iset1(0x00808080));
      const I signs = _mm512_xor_si512(sums, iset1(0x00808080));
      const I rows = _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(signs, gather));
      const auto at = reinterpret_cast<__m128i*>(p);  // rows of 64 bytes
      _mm_storeu_si128(at, _mm512_castsi512_si128(rows));
      _mm_storeu_si128(at + 4, _mm512_extracti32x4_epi32(rows, 1));
      _mm_storeu_si128(at + 8, _mm512_extracti32x4_epi32(rows, 2));
      _mm_storeu_si128(at + 12, _mm512_extracti32x4_epi32(rows, 3));
    }
  }

  static I right(I a, int by) { return _mm512_srlv_epi32(a, _mm512_set1_epi32(by)); }
  static I low_halves(I a) { return _mm512_and_si512(a, iset1(0x0f0f0f0f)); }
  static I high_halves(I a) { return low_halves(_mm512_srli_epi32(a, 4)); }
  static F byte(I a, int k) {
    return sub(to_float(_mm512_and_si512(right(a, 8 * k), iset1(255))), set1(128.0f));
  }
  static F half(I a, int k) {  // a permutation reads the lowest four bits alone
    const F values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(right(a, k < 4 ? 8 * k : 8 * (k - 4) + 4), values);
  }

  static Codes codes(I words) { return words; }
  static Inputs inputs(const int32_t* p) { return _mm512_set1_epi32(*p); }
  static Inputs four_each(I words) { return words; }
  // GCC 12 moves the sums of the intrinsic in and out of memory.
  static void dot(I& sum, Codes c, Inputs x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(c), "v"(x));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_AVX512_H_
