// Products of float32 matrices on AMX, which multiplies bfloat16 alone: a float32 is the sum of
// three of them, and six of the nine products of two such sums hold all but 2^-26 of the result.
// Weights that are bfloat16 themselves need three. (Henry, Tang and Heinecke, "Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", arXiv:1904.06376.)

#include "amx_product.h"

#include <immintrin.h>
#include <string.h>

#include "amx_tiles.h"
#include "pool.h"

namespace msq {
namespace {

constexpr int64_t kSide = 16;             // rows of a tile; it holds kSide x kStep bfloat16
constexpr int64_t kBlock = 2 * kSide;     // rows, and columns, of four tiles of sums
constexpr int64_t kStep = 32;             // inputs of a tile
constexpr int64_t kTile = kSide * kStep;  // bfloat16 in it
constexpr int kParts = 3;                 // bfloat16 that make a float32
constexpr int64_t kPartSize = 2 * kTile;
constexpr int64_t kStepSize = kParts * kPartSize;  // of a block: [part][half of the block][tile]
constexpr int64_t kDepth = 512;                    // inputs that are multiplied at a time
constexpr int64_t kMostRows = 256;                 // of so many inputs, which fit a core's cache
constexpr int64_t kMostColumns = 2048;             // that are packed at a time

// Of x and w, both [row][input]; or, without w, of the columns of x, [input][column], with each
// other.
struct Product {
  const float *x, *w, *bias;
  float* y;
  int64_t rows, outputs, inputs;
  int64_t column, column_end, depth, depth_end;  // that are being multiplied
  int64_t each;                                  // rows of a piece of work
  uint16_t* ws;
  uint8_t* parts;  // of a block of columns: how many are not zero
  bool not_finite, out_of_memory;

  bool begun() const { return depth > 0 || !w; }
  int64_t steps() const { return (depth_end - depth + kStep - 1) / kStep; }
};

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Three vectors of bfloat16 whose sum is x. They are rounded, not cut: then what is left is half as
// large, and the products that are left out a quarter. Subnormal rests are lost.
inline void split(__m512 x, __m256i (&parts)[kParts]) {
  for (__m256i& part : parts) {
    part = (__m256i)_mm512_cvtneps_pbh(x);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(wide));
  }
}

// Inputs k, ..., k + 15 of a row, zeros where there are none.
inline __m512 inputs_at(const float* row, bool exists, int64_t k, int64_t end) {
  if (!exists || k >= end) return _mm512_setzero_ps();
  return _mm512_maskz_loadu_ps(end - k >= 16 ? 0xffff : (1 << (end - k)) - 1, row + k);
}

bool is_odd(__m256i first) {  // NaN or inf, or rounded to it
  const __m256i top = _mm256_set1_epi16(0x7f80);
  return _mm256_cmpeq_epi16_mask(_mm256_and_si256(first, top), top) != 0;
}

void set(bool& flag) { __atomic_store_n(&flag, true, __ATOMIC_RELAXED); }

// Rows [first, end), in blocks of which the last is filled up with zeros.
void pack_row_blocks(Product& p, int64_t first, int64_t end, uint16_t* blocks) {
  bool odd = false;
  for (int64_t row = first; row < first + blocks_of(end - first, kBlock) * kBlock; ++row) {
    const int64_t block = (row - first) / kBlock, r = (row - first) % kBlock;
    uint16_t* to = blocks + block * p.steps() * kStepSize + r / kSide * kTile + r % kSide * kStep;
    for (int64_t k = p.depth; k < p.depth_end; k += kStep, to += kStepSize) {
      __m256i low[kParts], high[kParts];
      const float* from = p.x + row * p.inputs;
      split(inputs_at(from, row < end, k, p.depth_end), low);
      split(inputs_at(from, row < end, k + 16, p.depth_end), high);
      odd |= is_odd(low[0]) | is_odd(high[0]);
      for (int i = 0; i < kParts; ++i)
        _mm512_store_si512(to + i * 2 * kTile,
                           _mm512_inserti64x4(_mm512_castsi256_si512(low[i]), high[i], 1));
    }
  }
  if (odd) set(p.not_finite);
}

// [16][16] to [16][16]
inline void transpose(const uint32_t (&in)[16][16], uint16_t* out) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(in[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    _mm512_store_si512(out + i * kStep, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_store_si512(out + (i + 8) * kStep, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}

using Pairs = uint32_t[kParts][kSide][kSide];

// Pairs of inputs from k on, of 16 columns of x: [part][pair][column].
void take_pairs(Product& p, int64_t k, int64_t column, Pairs& pairs) {
  const int64_t left = p.rows - column;
  const __mmask16 some = left >= kSide ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
  bool odd = false;
  for (int64_t pair = 0; pair < kSide; ++pair) {
    __m256i parts[2][kParts];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = k + 2 * pair + i;
      const float* from = p.x + at * p.rows + column;
      split(_mm512_maskz_loadu_ps(at < p.depth_end ? some : 0, from), parts[i]);
      odd |= is_odd(parts[i][0]);
    }
    for (int part = 0; part < kParts; ++part) {
      const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(parts[1][part]), 16);
      _mm512_store_si512(pairs[part][pair],
                         _mm512_or_si512(_mm512_cvtepu16_epi32(parts[0][part]), second));
    }
  }
  if (odd) set(p.not_finite);
}

void pack_own_rows(Product& p, int64_t first, int64_t end, uint16_t* to) {
  for (int64_t row = first; row < end; row += kBlock)
    for (int64_t k = p.depth; k < p.depth_end; k += kStep, to += kStepSize)
      for (int64_t side = 0; side < 2; ++side) {
        alignas(64) Pairs pairs;
        take_pairs(p, k, row + side * kSide, pairs);
        for (int part = 0; part < kParts; ++part)
          transpose(pairs[part], to + (part * 2 + side) * kTile);
      }
}

void pack_own_columns(Product& p, int64_t block) {
  uint16_t* to = p.ws + block * p.steps() * kStepSize;
  for (int64_t k = p.depth; k < p.depth_end; k += kStep, to += kStepSize)
    for (int64_t side = 0; side < 2; ++side) {
      alignas(64) Pairs pairs;
      take_pairs(p, k, p.column + block * kBlock + side * kSide, pairs);
      for (int part = 0; part < kParts; ++part)
        memcpy(to + (part * 2 + side) * kTile, pairs[part], sizeof pairs[part]);
    }
  p.parts[block] = kParts;
}

// A tile of weights holds pairs of inputs: [pair][column][input of the pair].
void pack_columns(void* job, int64_t block) {
  Product& p = *static_cast<Product*>(job);
  if (!p.w) return pack_own_columns(p, block);
  uint16_t* to = p.ws + block * p.steps() * kStepSize;
  __m256i any[kParts] = {};
  bool odd = false;
  for (int64_t k = p.depth; k < p.depth_end; k += kStep, to += kStepSize)
    for (int64_t side = 0; side < 2; ++side) {
      alignas(64) Pairs pairs;  // [part][column][pair]
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t column = p.column + block * kBlock + side * kSide + i;
        const float* from = p.w + column * p.inputs;
        for (int64_t half = 0; half < 2; ++half) {
          __m256i parts[kParts];
          split(inputs_at(from, column < p.column_end, k + half * 16, p.depth_end), parts);
          odd |= is_odd(parts[0]);
          for (int part = 0; part < kParts; ++part) {
            any[part] = _mm256_or_si256(any[part], parts[part]);
            _mm256_store_si256(reinterpret_cast<__m256i*>(&pairs[part][i][half * 8]), parts[part]);
          }
        }
      }
      for (int part = 0; part < kParts; ++part)
        transpose(pairs[part], to + (part * 2 + side) * kTile);
    }
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  const auto some = [&](int part) { return !_mm256_testz_si256(any[part], magnitude); };
  p.parts[block] = some(2) ? 3 : some(1) ? 2 : 1;
  if (odd) set(p.not_finite);
}

inline void load_inputs(const uint16_t* part) {
  load_tile<4>(part, kTileRow);
  load_tile<5>(part + kTile, kTileRow);
}

inline void load_weights(const uint16_t* part) {
  load_tile<6>(part, kTileRow);
  load_tile<7>(part + kTile, kTileRow);
}

inline void multiply_tiles() {
  multiply<true, 0, 4, 6>();
  multiply<true, 1, 4, 7>();
  multiply<true, 2, 5, 6>();
  multiply<true, 3, 5, 7>();
}

// Adds products to sums of kBlock x kBlock; small parts before large ones.
void multiply_block(const uint16_t* x, const uint16_t* w, int64_t steps, int parts, float* sums,
                    int64_t stride, bool begun) {
  float* lower = sums + kSide * stride;
  if (begun) {
    load_tile<0>(sums, stride * 4);
    load_tile<1>(sums + kSide, stride * 4);
    load_tile<2>(lower, stride * 4);
    load_tile<3>(lower + kSide, stride * 4);
  } else {
    zero_sums<true>();
  }
  for (int64_t step = 0; step < steps; ++step, x += kStepSize, w += kStepSize) {
    load_inputs(x + 2 * kPartSize);
    load_weights(w);
    multiply_tiles();
    load_inputs(x + kPartSize);
    multiply_tiles();
    if (parts > 1) {
      load_weights(w + kPartSize);
      multiply_tiles();
    }
    load_inputs(x);
    if (parts > 1) {
      multiply_tiles();
      if (parts > 2) {
        load_weights(w + 2 * kPartSize);
        multiply_tiles();
      }
      load_weights(w);
    }
    multiply_tiles();
  }
  store_tile<0>(sums, stride * 4);
  store_tile<1>(sums + kSide, stride * 4);
  store_tile<2>(lower, stride * 4);
  store_tile<3>(lower + kSide, stride * 4);
}

void copy(const float* from, int64_t stride, float* to, int64_t to_stride, int64_t rows,
          int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    memcpy(to + r * to_stride, from + r * stride, static_cast<size_t>(columns) * 4);
}

// Sums of the rows from `row` on, of one block of columns; `x` are their packed inputs.
void one_block(const Product& p, const uint16_t* x, int64_t row, int64_t end, int64_t block) {
  const int64_t column = p.column + block * kBlock, steps = p.steps();
  const int64_t height = least(kBlock, end - row), width = least(kBlock, p.column_end - column);
  const uint16_t* w = p.ws + block * steps * kStepSize;
  float* y = p.y + row * p.outputs + column;
  if (height == kBlock && width == kBlock) {
    multiply_block(x, w, steps, p.parts[block], y, p.outputs, p.begun());
  } else {
    alignas(64) float sums[kBlock * kBlock];
    if (p.begun()) copy(y, p.outputs, sums, kBlock, height, width);
    multiply_block(x, w, steps, p.parts[block], sums, kBlock, p.begun());
    copy(sums, kBlock, y, p.outputs, height, width);
  }
  if (!p.bias || p.depth_end < p.inputs) return;
  for (int64_t r = 0; r < height; ++r)
    for (int64_t i = 0; i < width; ++i) y[r * p.outputs + i] += p.bias[column + i];
}

void multiply_rows(void* job, int64_t index) {
  Product& p = *static_cast<Product*>(job);
  const int64_t first = index * p.each, end = least(p.rows, first + p.each);
  const int64_t size = p.steps() * kStepSize;  // of a block
  uint16_t* x = static_cast<uint16_t*>(scratch(0, blocks_of(p.each, kBlock) * size * 2));
  if (!x) return set(p.out_of_memory);
  if (p.w)
    pack_row_blocks(p, first, end, x);
  else
    pack_own_rows(p, first, end, x);
  const Tiles tiles(kSide);
  for (int64_t block = 0; block < blocks_of(p.column_end - p.column, kBlock); ++block)
    for (int64_t row = first; row < end; row += kBlock)
      if (p.w || row >= p.column + block * kBlock)
        one_block(p, x + (row - first) / kBlock * size, row, end, block);
}

int run(Product& p, int threads) {
  const int64_t columns = blocks_of(least(p.outputs, kMostColumns), kBlock);
  const int64_t steps = blocks_of(least(p.inputs, kDepth), kStep);
  uint8_t parts[kMostColumns / kBlock];
  p.parts = parts;
  p.ws = static_cast<uint16_t*>(scratch(1, columns * steps * kStepSize * 2));
  if (!p.ws) return MSQ_NO_MEMORY;
  p.each = least(kMostRows, blocks_of(blocks_of(p.rows, threads), kBlock) * kBlock);
  for (p.column = 0; p.column < p.outputs; p.column = p.column_end) {
    p.column_end = least(p.outputs, p.column + kMostColumns);
    for (p.depth = 0; p.depth < p.inputs; p.depth = p.depth_end) {
      p.depth_end = least(p.inputs, p.depth + kDepth);
      share_out(blocks_of(p.column_end - p.column, kBlock), threads, pack_columns, &p);
      if (!p.not_finite) share_out(blocks_of(p.rows, p.each), threads, multiply_rows, &p);
      if (p.not_finite) return MSQ_NOT_FINITE;
      if (p.out_of_memory) return MSQ_NO_MEMORY;
    }
  }
  return MSQ_OK;
}

}  // namespace

int amx_product(const float* x, int64_t rows, const float* w, int64_t outputs, int64_t inputs,
                const float* bias, float* y, int threads) {
  Product p = {};
  p.x = x;
  p.w = w;
  p.bias = bias;
  p.y = y;
  p.rows = rows;
  p.outputs = outputs;
  p.inputs = inputs;
  return run(p, threads);
}

int amx_syrk(const float* x, int64_t rows, int64_t columns, float* products, int threads) {
  Product p = {};
  p.x = x;
  p.y = products;
  p.rows = p.outputs = columns;
  p.inputs = rows;
  return run(p, threads);
}

}  // namespace msq
