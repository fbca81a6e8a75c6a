// Weights and float inputs as the tiles of AMX take them.

#ifndef MS_QUANT_AMX_INPUTS_H_
#define MS_QUANT_AMX_INPUTS_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "amx_tiles.h"
#include "avx512.h"
#include "linear_call.h"

namespace msq {
namespace {

// --- weights

// A row of a panel, 32-bit words of codes, to the rows of a step that it holds: `to`, `to` + 128...
template <int BITS, bool FLOAT>
struct Spread;

template <>
struct Spread<8, false> {
  static void row(const uint8_t* from, uint8_t* to) { memcpy(to, from, kPanelRow); }
};

template <>
struct Spread<4, false> {
  static void row(const uint8_t* from, uint8_t* to) {
    for (int64_t at = 0; at < kPanelRow; at += 64) {
      const __m512i words = _mm512_loadu_si512(from + at);
      _mm512_storeu_si512(to + at, Avx512Vnni::low_halves(words));
      _mm512_storeu_si512(to + kPanelRow + at, Avx512Vnni::high_halves(words));
    }
  }
};

// Two bfloat16 in a word: codes of up to 8 bits are exact in the upper halves of floats.
inline __m512i bfloat_pair(__m512 low, __m512 high) {
  const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, below, _mm512_castps_si512(high));
}

template <>
struct Spread<8, true> {
  static void row(const uint8_t* from, uint8_t* to) {
    for (int64_t at = 0; at < kPanelRow; at += 64) {
      const __m512i words = _mm512_loadu_si512(from + at);
      const auto code = [&](int i) { return Avx512Vnni::byte(words, i); };
      _mm512_storeu_si512(to + at, bfloat_pair(code(0), code(1)));
      _mm512_storeu_si512(to + kPanelRow + at, bfloat_pair(code(2), code(3)));
    }
  }
};

template <>
struct Spread<4, true> {
  // bfloat16 of -8 to 7; lanes of 16 bits choose with their lowest 5 bits, so it is there twice.
  static __m512i values() {
    alignas(32) static const uint16_t kValues[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
                                                     0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040,
                                                     0x4080, 0x40a0, 0x40c0, 0x40e0};
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(kValues)));
  }

  static void row(const uint8_t* from, uint8_t* to) {
    const __m512i table = values();
    const __m512i low_bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
    const __m512i high_bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
    for (int64_t at = 0; at < kPanelRow; at += 64) {
      const __m512i words = _mm512_loadu_si512(from + at);
      const __m512i pairs[2] = {_mm512_shuffle_epi8(words, low_bytes),
                                _mm512_shuffle_epi8(words, high_bytes)};
      for (int i = 0; i < 2; ++i) {
        uint8_t* out = to + i * kPanelRow + at;
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(pairs[i], table));
        const __m512i upper = _mm512_srli_epi16(pairs[i], 4);
        _mm512_storeu_si512(out + 2 * kPanelRow, _mm512_permutexvar_epi16(upper, table));
      }
    }
  }
};

// Steps [begin, end) of a panel that has `rows` rows; zeros beyond them. They may stay where they
// are, else they are put into `to`.
template <int BITS, bool FLOAT>
const uint8_t* weights_of(const uint8_t* panel, int64_t rows, int64_t begin, int64_t end,
                          uint8_t* to) {
  constexpr int64_t kEach = FLOAT ? BITS : 2 * BITS;  // rows of a step
  const bool whole = end * kEach <= rows;
  if (BITS == 8 && !FLOAT && whole) return panel + begin * kStepBytes;
  uint8_t* out = to;
  for (int64_t row = begin * kEach; row < (whole ? end * kEach : rows); ++row) {
    Spread<BITS, FLOAT>::row(panel + row * kPanelRow, out);
    out += kStepBytes / kEach;
  }
  memset(out, 0, static_cast<size_t>(to + (end - begin) * kStepBytes - out));
  return to;
}

// --- inputs of float

constexpr int64_t kFloatStep = 32;  // inputs
constexpr int kFloatParts = 3;
constexpr float kLargest = 0x1p96f, kSmallest = 0x1p-102f;

// The parts of a float that are exact in bfloat16: its upper 8 bits of 24, the next, and the last.
inline void three_parts(__m512 x, __m512 (&parts)[kFloatParts]) {
  for (__m512& part : parts) {
    part =
        _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(~0xffff)));
    x = _mm512_sub_ps(x, part);
  }
}

// Which numbers are not taken in parts: NaN, infinities and what is so large that its products with
// codes may overflow before they are scaled; and what is so small that a part may be subnormal,
// which tiles take as 0.
inline __mmask16 has_no_parts(__m512 x) {
  const __m512 size = _mm512_abs_ps(x);
  const __m512i bits = _mm512_castps_si512(size);
  const __mmask16 large = _mm512_cmp_ps_mask(size, _mm512_set1_ps(kLargest), _CMP_NLE_UQ);
  const __mmask16 small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(kSmallest), _CMP_LT_OQ);
  return large | (small & _mm512_test_epi32_mask(bits, bits));
}

// The upper halves of the words of both, in order.
inline __m512i upper_halves(__m512 low, __m512 high) {
  alignas(64) static const uint16_t kOrder[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                  23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                  45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(_mm512_castps_si512(low), _mm512_load_si512(kOrder),
                                   _mm512_castps_si512(high));
}

inline __m512 some_of(const float* x, const float* mul, int64_t count) {
  const __mmask16 there = static_cast<__mmask16>(count >= 16  ? 0xffff
                                                 : count <= 0 ? 0
                                                              : (1 << count) - 1);
  const __m512 v = _mm512_maskz_loadu_ps(there, x);
  return mul ? _mm512_maskz_mul_ps(there, v, _mm512_maskz_loadu_ps(there, mul)) : v;
}

// One row of a call in three parts, [step][part][row][32 of bfloat16]. False if it has none.
inline bool split_row(const Call& c, int64_t row) {
  const int64_t n = c.p.inputs, block = row / c.tall, bytes = c.rows_of(block) * kTileRow;
  const float *x = c.x + row * n, *mul = c.p.floats(c.p.mul);
  uint8_t* out =
      reinterpret_cast<uint8_t*>(c.codes + block * c.tall * c.words) + row % c.tall * kTileRow;
  __mmask16 wrong = 0;
  for (int64_t k = 0; k < n; k += kFloatStep) {
    const __m512 low = some_of(x + k, mul ? mul + k : mul, n - k),
                 high = some_of(x + k + 16, mul ? mul + k + 16 : mul, n - k - 16);
    wrong |= has_no_parts(low) | has_no_parts(high);
    __m512 lows[kFloatParts], highs[kFloatParts];
    three_parts(low, lows);
    three_parts(high, highs);
    for (int part = 0; part < kFloatParts; ++part, out += bytes)
      _mm512_storeu_si512(out, upper_halves(lows[part], highs[part]));
  }
  return !wrong;
}

// The sums of a row's groups, which zero points are multiplied by.
inline void sum_groups(const Call& c, int64_t row) {
  const Params& p = c.p;
  const float *x = c.x + row * p.inputs, *mul = p.floats(p.mul);
  for (int64_t g = 0; g < p.groups(); ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = g * p.group; k < (g + 1) * p.group; k += 16)
      sum = _mm512_add_ps(sum, some_of(x + k, mul ? mul + k : mul, (g + 1) * p.group - k));
    c.float_sums[row * p.groups() + g] = _mm512_reduce_add_ps(sum);
  }
}

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_AMX_INPUTS_H_
