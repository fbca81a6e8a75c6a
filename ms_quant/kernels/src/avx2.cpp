#include "attention_impl.h"
#include "x86_256.h"

namespace msq {
namespace {

// Products of bytes are made of 16-bit ones: the instruction for bytes would saturate.
struct Avx2 : X86Of256 {
  static constexpr int kRows = 4;
  static constexpr int32_t kBias = 0;
  static constexpr bool kByteSplit = false;
  struct Pair {
    __m256i even, odd;
  };
  using Codes = Pair;
  using Inputs = Pair;

  static Pair split(__m256i bytes) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }
  static Codes codes(I words) { return split(words); }
  static Inputs inputs(const int32_t* p) { return split(_mm256_set1_epi32(*p)); }
  static Inputs four_each(I words) { return split(words); }
  static void dot(I& sum, const Codes& c, const Inputs& x) {
    sum = iadd(sum, iadd(_mm256_madd_epi16(c.even, x.even), _mm256_madd_epi16(c.odd, x.odd)));
  }
  static F byte(I a, int k) {
    const I high = _mm256_sll_epi32(a, _mm_cvtsi32_si128(24 - 8 * k));
    return to_float(_mm256_srai_epi32(high, 24));
  }
};

}  // namespace

const Kernels* kernels_avx2() { return all_kernels<Avx2>(); }

}  // namespace msq
