// Rows of queries, keys and values as floats or as words of codes, and the other way round.

#ifndef MS_QUANT_ATTENTION_OPERANDS_H_
#define MS_QUANT_ATTENTION_OPERANDS_H_

#include <stdint.h>
#include <string.h>

#include "sparse_attention.h"
#include "vectors.h"

namespace msq {
namespace {

inline int64_t scales_of_row(const MsqOperand& o, int64_t size) {
  return (size + o.columns - 1) / o.columns;
}

// The scales of a token: one for each block of columns.
inline const float* scales_of(const MsqOperand& o, int64_t head, int64_t tokens, int64_t size,
                              int64_t token) {
  const int64_t blocks = (tokens + o.rows - 1) / o.rows;
  return o.scales + (head * blocks + token / o.rows) * scales_of_row(o, size);
}

inline float scale_of(const MsqOperand& o, int64_t head, int64_t tokens, int64_t size,
                      int64_t token, int64_t column) {
  return scales_of(o, head, tokens, size, token)[column];
}

// `count` codes that share a scale, or have each their own.
inline void decode_part(const MsqOperand& o, const uint8_t* codes, int64_t count, const float* scales,
                        int64_t step, float* out) {
  if (o.kind == MSQ_INT8) {
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<float>(static_cast<int8_t>(codes[i])) * scales[i * step];
    return;
  }
  const float* table = e4m3_table();
  for (int64_t i = 0; i < count; ++i) out[i] = table[codes[i]] * scales[i * step];
}

// Tokens of a head as floats, row by row.
inline void decode(const MsqOperand& o, int64_t head, int64_t tokens, int64_t size, KeyRange range,
                   float* out) {
  const int64_t first = (head * tokens + range.begin) * size, count = range.end - range.begin;
  if (o.kind == MSQ_FLOATS) {
    memcpy(out, static_cast<const float*>(o.data) + first, static_cast<size_t>(count * size * 4));
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(o.data) + first;
  for (int64_t token = range.begin; token < range.end; ++token, codes += size, out += size) {
    const float* scales = scales_of(o, head, tokens, size, token);
    if (o.columns == 1) {
      decode_part(o, codes, size, scales, 1, out);
      continue;
    }
    for (int64_t at = 0; at < size; at += o.columns)
      decode_part(o, codes + at, at_most(o.columns, size - at), scales + at / o.columns, 0,
                  out + at);
  }
}

// Rows of int8 codes as `words` words of four each, zeros after the last.
inline void copy_codes(const MsqOperand& o, int64_t head, int64_t tokens, int64_t size,
                       KeyRange range, int64_t words, int32_t* out) {
  const int8_t* codes = static_cast<const int8_t*>(o.data) + (head * tokens + range.begin) * size;
  for (int64_t token = range.begin; token < range.end; ++token, codes += size, out += words) {
    out[words - 1] = 0;
    memcpy(out, codes, static_cast<size_t>(size));
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
