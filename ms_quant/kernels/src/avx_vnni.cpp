#include "attention_impl.h"
#include "x86_256.h"

namespace msq {
namespace {

struct AvxVnni : X86Of256 {
  static constexpr int kRows = 6;
  static constexpr int32_t kBias = 128;
  static constexpr bool kByteSplit = true;
  using Codes = __m256i;
  using Inputs = __m256i;

  static Codes codes(I words) { return words; }
  static Inputs inputs(const int32_t* p) { return _mm256_set1_epi32(*p); }
  static Inputs four_each(I words) { return words; }
  static void dot(I& sum, Codes c, Inputs x) { sum = _mm256_dpbusd_avx_epi32(sum, c, x); }
  static void store_bytes(int8_t* p, const F (&v)[8]) {
    const I gather = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < 8; ++i, p += 8) {
      const I sums = iadd(_mm256_cvtps_epi32(v[i]), iset1(0x00808080));
      const I signs = _mm256_xor_si256(sums, iset1(0x00808080));
      alignas(32) int64_t rows[4];
      istore(rows, _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(signs, gather), order));
      for (int d = 0; d < 4; ++d) memcpy(p + d * kBlock, rows + d, 8);
    }
  }
  static F byte(I a, int k) {
    return sub(to_float(_mm256_and_si256(right(a, 8 * k), iset1(255))), set1(128.0f));
  }
};

}  // namespace

const Kernels* kernels_avx_vnni() { return all_kernels<AvxVnni>(); }

}  // namespace msq
