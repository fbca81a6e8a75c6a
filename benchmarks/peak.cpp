// What this machine can do at most: products of int8 a second with VNNI and with AMX, and bytes
// read a second. benchmarks/linear.py builds it.

#include <immintrin.h>
#include <stdint.h>

#ifdef WITH_AMX
#include "../ms_quant/kernels/src/amx_tiles.h"
#endif

#define API extern "C" __attribute__((visibility("default")))
#define EACH(f) \
  f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15)

// Multiplications of bytes done in that many rounds.
API int64_t vnni_products(int64_t rounds) {
  const __m512i b = _mm512_set1_epi8(1), c = _mm512_set1_epi8(2);
#define BEGIN(i) __m512i a##i = _mm512_setzero_si512();
#define STEP(i) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(a##i) : "v"(b), "v"(c));
#define END(i) sum = _mm512_add_epi32(sum, a##i);
  EACH(BEGIN)
  for (int64_t r = 0; r < rounds; ++r) {
    EACH(STEP)
  }
  __m512i sum = _mm512_setzero_si512();
  EACH(END)
  volatile int32_t sink = _mm512_reduce_add_epi32(sum);
  (void)sink;
  return rounds * 16 * 64;
}

#ifdef WITH_AMX
// The same with tiles, once the process may use them.
API int64_t amx_products(int64_t rounds) {
  const msq::Tiles tiles(msq::kTall);
  for (int64_t r = 0; r < rounds; ++r) {
    msq::multiply<false, 0, 4, 6>();
    msq::multiply<false, 1, 4, 7>();
    msq::multiply<false, 2, 5, 6>();
    msq::multiply<false, 3, 5, 7>();
  }
  return rounds * 4 * 16 * 16 * 64;
}
#endif

// Reads `count` bytes, a multiple of 512.
API int64_t read_bytes(const uint8_t* from, int64_t count) {
  __m512i sums[8];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 512)
    for (int j = 0; j < 8; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(from) + i + 64 * j + 4096, _MM_HINT_T0);
      sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(from + i + 64 * j));
    }
  for (int j = 1; j < 8; ++j) sums[0] = _mm512_or_si512(sums[0], sums[j]);
  return _mm512_reduce_or_epi64(sums[0]);
}
