#include "block_impl.h"
#include "x86_256.h"

namespace msq {
namespace {

struct AvxVnni : X86Of256 {
  static constexpr int kRows = 6;
  static constexpr int32_t kBias = 128;
  using Codes = __m256i;
  using Inputs = __m256i;

  static Codes codes(I words) { return words; }
  static Inputs inputs(const int32_t* p) { return _mm256_set1_epi32(*p); }
  static Inputs four_each(I words) { return words; }
  static void dot(I& sum, Codes c, Inputs x) { sum = _mm256_dpbusd_avx_epi32(sum, c, x); }
  static F byte(I a, int k) {
    return sub(to_float(_mm256_and_si256(right(a, 8 * k), iset1(255))), set1(128.0f));
  }
};

}  // namespace

const Kernels* kernels_avx_vnni() { return all_kernels<AvxVnni>(); }

}  // namespace msq
