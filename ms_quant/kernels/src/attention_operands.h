// Rows of queries, keys and values as floats or as words of codes, and the other way round.

#ifndef MS_QUANT_ATTENTION_OPERANDS_H_
#define MS_QUANT_ATTENTION_OPERANDS_H_

#include <stdint.h>
#include <string.h>

#include "sparse_attention.h"
#include "vectors.h"

namespace msq {
namespace {

// Of one head, with what is asked of its operands everywhere.
struct HeadOperand {
  const MsqOperand& o;
  const uint8_t* data;    // of token 0
  const float* scales;    // of the head
  const int64_t* order;   // of floats; null where they are read by place
  int64_t size, columns;  // of a token: numbers, and scales

  HeadOperand(const MsqOperand& operand, const MsqBlockAttention& c, int64_t batch, int64_t head,
              int64_t tokens, int64_t numbers)
      : o(operand), size(numbers) {
    const int64_t at = batch * o.steps.batch + head * o.steps.head;
    data = static_cast<const uint8_t*>(o.data) + at * bytes();
    order = o.kind == MSQ_FLOATS ? order_of(c, head) : nullptr;
    columns = o.kind == MSQ_FLOATS ? 0 : (size + o.columns - 1) / o.columns;
    const int64_t blocks = columns ? (tokens + o.rows - 1) / o.rows : 0;
    scales = o.scales + (columns ? (batch * c.heads + head) * blocks * columns : 0);
  }

  int64_t bytes() const { return o.kind == MSQ_FLOATS ? 4 : 1; }
  const uint8_t* row(int64_t place) const {
    return data + (order ? order[place] : place) * o.steps.token * bytes();
  }
  const float* floats(int64_t place) const { return reinterpret_cast<const float*>(row(place)); }
  // The scales of a token: one for each block of columns.
  const float* scales_of(int64_t place) const { return scales + place / o.rows * columns; }
  // Whether the rows of a range lie one after the other, at the steps of tokens.
  bool in_a_row(KeyRange range) const {
    if (o.kind != MSQ_FLOATS) return false;
    for (int64_t place = range.begin + 1; order && place < range.end; ++place)
      if (order[place] != order[place - 1] + 1) return false;
    return true;
  }
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// The number that a code of e4m3fn is, without a branch, so that the compiler makes vectors of it.
inline float of_e4m3(uint8_t code) {
  const int32_t size = code & 127;
  const auto all_if_negative = [](int32_t x) { return static_cast<uint32_t>(x >> 31); };
  const float normal = float_of((static_cast<uint32_t>(size) << 20) + 0x3c000000u);
  // Subnormal 2^-6 m is read as 2^-7 (1 + m), with m below 1.
  const float value = normal + float_of(bits_of(normal - 0x1p-6f) & all_if_negative(size - 8));
  const uint32_t nan = all_if_negative(126 - size) & 0x7fc00000u;
  return float_of(bits_of(value) | nan | (code & 128u) << 24);
}

inline float of_int8(uint8_t code) { return static_cast<float>(static_cast<int8_t>(code)); }

// A row of codes times its scales: one for each `columns` of them.
template <class Value>
inline void decode_row(const uint8_t* __restrict codes, int64_t size,
                       const float* __restrict scales, int64_t columns, float* __restrict out,
                       Value value) {
  if (columns == 1) {
    for (int64_t i = 0; i < size; ++i) out[i] = value(codes[i]) * scales[i];
    return;
  }
  for (int64_t at = 0; at < size; at += at_most(columns, size), ++scales) {
    const int64_t end = at_most(at + columns, size);
    const float by = *scales;
    for (int64_t i = at; i < end; ++i) out[i] = value(codes[i]) * by;
  }
}

// Tokens as floats, row by row.
inline void decode(const HeadOperand& h, KeyRange range, float* out) {
  const int64_t size = h.size;
  for (int64_t place = range.begin; place < range.end; ++place, out += size) {
    const uint8_t* row = h.row(place);
    if (h.o.kind == MSQ_FLOATS)
      memcpy(out, row, static_cast<size_t>(4 * size));
    else if (h.o.kind == MSQ_INT8)
      decode_row(row, size, h.scales_of(place), h.o.columns, out, of_int8);
    else
      decode_row(row, size, h.scales_of(place), h.o.columns, out, of_e4m3);
  }
}

// Rows of int8 codes as `words` words of four each, zeros after the last.
inline void copy_codes(const HeadOperand& h, KeyRange range, int64_t words, int32_t* out) {
  for (int64_t place = range.begin; place < range.end; ++place, out += words) {
    out[words - 1] = 0;
    memcpy(out, h.row(place), static_cast<size_t>(h.size));
  }
}

// Of one block of columns.
inline int32_t sum_of_codes(const int32_t* words, int64_t count, int64_t column, int64_t columns) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(words);
  const int64_t end = at_most(4 * count, (column + 1) * columns);
  int32_t sum = 0;
  for (int64_t i = column * columns; i < end; ++i) sum += codes[i];
  return sum;
}

// A square of 4 by 4 with its rows and columns exchanged.
inline void transpose_square(const float* from, int64_t stride, float* to, int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
  Four rows[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&rows[i], from + i * stride, 16);
#if defined(__clang__)
#define MSQ_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef int Places __attribute__((vector_size(16)));
#define MSQ_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif
  const Four a = MSQ_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5);
  const Four b = MSQ_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
  const Four c = MSQ_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
  const Four d = MSQ_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
  const Four made[4] = {MSQ_SHUFFLE(a, b, 0, 1, 4, 5), MSQ_SHUFFLE(a, b, 2, 3, 6, 7),
                        MSQ_SHUFFLE(c, d, 0, 1, 4, 5), MSQ_SHUFFLE(c, d, 2, 3, 6, 7)};
#undef MSQ_SHUFFLE
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * to_stride, &made[i], 16);
}

// `to` (columns, to_stride) of `from` (rows, stride), zeros after the last row. Words of codes pass
// through it as floats: they are moved only.
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  const int64_t whole = rows / 4 * 4;
  for (int64_t row = 0; row < whole; row += 4) {
    int64_t column = 0;
    for (; column + 4 <= columns; column += 4)
      transpose_square(from + row * stride + column, stride, to + column * to_stride + row,
                       to_stride);
    for (; column < columns; ++column)
      for (int64_t i = row; i < row + 4; ++i)
        memcpy(to + column * to_stride + i, from + i * stride + column, 4);
  }
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = whole; row < rows; ++row)
      memcpy(to + column * to_stride + row, from + row * stride + column, 4);
    for (int64_t row = rows; row < to_stride; ++row) to[column * to_stride + row] = 0.0f;
  }
}

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_ATTENTION_OPERANDS_H_
