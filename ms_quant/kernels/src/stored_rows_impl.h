// Rows of a weight become int8 codes from what a checkpoint stores, bfloat16 or E4M3 with scales,
// without a float32 copy of them.
//
// A row is read twice. Its largest magnitude is that of the largest stored bits, compared as
// integers, of each run that shares a scale. Then blocks of 64 values are made float32, in the
// nearest cache, and rounded as quantize_impl.h does it. The loops over values are plain: compilers
// make vectors of them.

#ifndef MS_QUANT_STORED_ROWS_IMPL_H_
#define MS_QUANT_STORED_ROWS_IMPL_H_

#include <stdint.h>

#include "quantize_impl.h"

namespace msq {
namespace {

inline float of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// E4M3 of a code that is no NaN. The bits of one below 2^-6, read as a normal number, are 2^-6 more
// than it.
inline float of_e4m3(uint32_t code) {
  const uint32_t size = code & 0x7f, small = size < 8;
  const float above = small ? 0x1p-6f : 0.0f;
  const float value = of_bits((size << 20) + ((120 + small) << 23)) - above;
  return code & 0x80 ? -value : value;
}

struct Bfloat16Row {
  const uint16_t* stored;

  Bfloat16Row(const StoredRows& c, int64_t row)
      : stored(static_cast<const uint16_t*>(c.stored) + row * c.columns) {}

  // NaN or infinite if something in the row is.
  float most(int64_t columns) const {
    uint16_t found = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const uint16_t size = stored[k] & 0x7fff;
      found = size > found ? size : found;
    }
    return of_bfloat16(found);
  }

  void widen(int64_t k, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; ++i) out[i] = of_bfloat16(stored[k + i]);
  }
};

struct Float8Row {
  const uint8_t* stored;
  const float* scales;
  int64_t width;  // of the runs that share a scale

  Float8Row(const StoredRows& c, int64_t row)
      : stored(static_cast<const uint8_t*>(c.stored) + row * c.columns),
        scales(c.block_scales + row * ((c.columns + c.width - 1) / c.width)),
        width(c.width) {}

  float most(int64_t columns) const {
    float found = 0;
    for (int64_t start = 0, run = 0; start < columns; start += width, ++run) {
      const uint8_t largest = most_bits(stored + start, at_most(width, columns - start));
      const float size = of_e4m3(largest) * scales[run];
      if (largest == 0x7f || !(size < __builtin_inff())) return __builtin_nanf("");
      found = size > found ? size : found;
    }
    return found;
  }

  static uint8_t most_bits(const uint8_t* codes, int64_t count) {
    uint8_t found = 0;
    for (int64_t k = 0; k < count; ++k) {
      const uint8_t size = codes[k] & 0x7f;
      found = size > found ? size : found;
    }
    return found;
  }

  void widen(int64_t k, int64_t count, float* out) const {
    for (int64_t i = 0; i < count;) {
      const int64_t run = (k + i) / width, end = at_most(count, (run + 1) * width - k);
      const float scale = scales[run];
      for (; i < end; ++i) out[i] = of_e4m3(stored[k + i]) * scale;
    }
  }
};

template <class S>
struct Stored {
  using Q = Quantize<S>;

  template <class Row>
  static void quantize_row(void* job, int64_t index) {
    const StoredRows& c = *static_cast<const StoredRows*>(job);
    const Row row(c, index);
    const float scale = Q::scale_of(row.most(c.columns), c.largest, 1.0f);
    c.scales[index] = Q::rounded_up(scale, c.cleared);
    if (!(scale < __builtin_inff())) return;  // the caller is told
    const auto steps = Q::steps_per_token(nullptr, c.scales[index], c.smallest, c.largest);
    int8_t* out = c.codes + index * c.columns;
    alignas(64) float values[kBlock];
    int64_t k = 0;
    for (; k + kBlock <= c.columns; k += kBlock) {
      row.widen(k, kBlock, values);
      Q::template block_codes<false, true>(steps, values, k, out + k);
    }
    if (k == c.columns) return;
    int8_t last[kBlock];
    for (float& value : values) value = 0;
    row.widen(k, c.columns - k, values);
    Q::template block_codes<false, true>(steps, values, k, last);
    for (int64_t i = k; i < c.columns; ++i) out[i] = last[i - k];
  }

  static void quantize(StoredRows& rows, int threads) {
    const Piece piece = rows.block_scales ? quantize_row<Float8Row> : quantize_row<Bfloat16Row>;
    share_out(rows.rows, threads, piece, &rows);
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_STORED_ROWS_IMPL_H_
