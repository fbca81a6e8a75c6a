// Blocks of tokens: their means, by which rules of sparse attention choose what is computed, and
// their codes.

#include <float.h>
#include <math.h>
#include <string.h>

#include <algorithm>

#include "kernels.h"
#include "pool.h"
#include "sparse_attention.h"

namespace msq {
namespace {

struct Means {
  const MsqOperand& o;
  int64_t heads, tokens, size;
  const int64_t* order;
  int64_t block, blocks;
  float* y;

  // Rows are added one after the other, as NumPy adds along an axis that is not the last.
  static void work(void* means, int64_t item) {
    const Means& m = *static_cast<Means*>(means);
    const int64_t head = item / m.blocks, begin = item % m.blocks * m.block;
    const int64_t end = std::min(begin + m.block, m.tokens);
    const float* x = static_cast<const float*>(m.o.data) + head / m.heads * m.o.steps.batch +
                     head % m.heads * m.o.steps.head;
    const auto row = [&](int64_t place) {
      return x + (m.order ? m.order[place] : place) * m.o.steps.token;
    };
    float* __restrict y = m.y + item * m.size;
    memcpy(y, row(begin), static_cast<size_t>(4 * m.size));
    for (int64_t place = begin + 1; place < end; ++place) {
      const float* __restrict add = row(place);
      for (int64_t i = 0; i < m.size; ++i) y[i] += add[i];
    }
    const float count = static_cast<float>(end - begin);
    for (int64_t i = 0; i < m.size; ++i) y[i] /= count;
  }
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Half to even; within the range of int8.
inline uint8_t to_int8(float x) {
  const float low = x < -128.0f ? -128.0f : x, clipped = low > 127.0f ? 127.0f : low;
  return static_cast<uint8_t>(bits_of(clipped + 0x1.8p23f));  // its last bits are the number
}

// Half to even, without a branch, so that the compiler makes vectors of it.
inline uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 24 & 128u;
  const float all = fabsf(x), size = all > 448.0f ? 448.0f : all;
  const uint32_t found = bits_of(size);
  const uint32_t normal = ((found + 0x7ffffu + (found >> 20 & 1u)) >> 20) - (120u << 3);
  const uint32_t subnormal = bits_of(size + 0x1p14f) - bits_of(0x1p14f);  // in steps of 2^-9
  return static_cast<uint8_t>(sign | (size < 0x1p-6f ? subnormal : normal));
}

struct Quantized {
  const MsqOperand& x;
  const MsqOperand& y;
  int64_t heads, tokens, size;
  const int64_t* order;
  int64_t order_heads, blocks;
  bool given;
  uint8_t* codes;
  float* scales;

  // The largest magnitude of each column.
  template <class Row>
  static void absmax(const Row& row, int64_t begin, int64_t end, int64_t size, float* most) {
    std::fill(most, most + size, 0.0f);
    for (int64_t place = begin; place < end; ++place) {
      const float* __restrict x = row(place);
      for (int64_t i = 0; i < size; ++i) most[i] = most[i] < fabsf(x[i]) ? fabsf(x[i]) : most[i];
    }
  }

  float scale_of(float most) const {
    const float scale = most / (y.kind == MSQ_INT8 ? 127.0f : 448.0f);
    return y.kind == MSQ_INT8 && scale < FLT_MIN ? 1.0f : scale;
  }

  template <class Row, class Code>
  static void encode(const Row& row, int64_t begin, int64_t end, int64_t size,
                     const float* __restrict by, uint8_t* __restrict out, Code code) {
    for (int64_t place = begin; place < end; ++place, out += size) {
      const float* __restrict x = row(place);
      for (int64_t i = 0; i < size; ++i) out[i] = code(x[i] / by[i]);
    }
  }

  static void work(void* job, int64_t item) {
    const Quantized& q = *static_cast<Quantized*>(job);
    const int64_t head = item / q.blocks, begin = item % q.blocks * q.y.rows, size = q.size;
    const int64_t end = std::min(begin + q.y.rows, q.tokens), columns = q.y.columns;
    const float* x = static_cast<const float*>(q.x.data) + head / q.heads * q.x.steps.batch +
                     head % q.heads * q.x.steps.head;
    const int64_t* order = q.order;
    if (order && q.order_heads > 1) order += head % q.heads * q.tokens;
    const auto row = [&](int64_t place) {
      return x + (order ? order[place] : place) * q.x.steps.token;
    };
    float most[kMostHeadSize], by[kMostHeadSize];
    if (!q.given) absmax(row, begin, end, size, most);
    float* scales = q.scales + item * ((size + columns - 1) / columns);
    for (int64_t at = 0; at < size; at += columns, ++scales) {
      const int64_t stop = std::min(at + columns, size);
      if (!q.given) *scales = q.scale_of(*std::max_element(most + at, most + stop));
      std::fill(by + at, by + stop, *scales > 0 ? *scales : INFINITY);
    }
    uint8_t* out = q.codes + (head * q.tokens + begin) * size;
    if (q.y.kind == MSQ_INT8)
      encode(row, begin, end, size, by, out, to_int8);
    else
      encode(row, begin, end, size, by, out, to_e4m3);
  }
};

}  // namespace
}  // namespace msq

int32_t msq_block_means(const MsqOperand* x, int64_t batch, int64_t heads, int64_t tokens,
                        int64_t size, const int64_t* order, int64_t block, float* y,
                        int32_t threads) {
  if (!x->data || x->kind != MSQ_FLOATS || !y || batch < 0 || heads < 0 || tokens < 0 || size < 0 ||
      block < 1 || threads < 1)
    return MSQ_BAD_ARGUMENT;
  for (int64_t place = 0; order && place < tokens; ++place)
    if (order[place] < 0 || order[place] >= tokens) return MSQ_BAD_ARGUMENT;
  const int64_t blocks = (tokens + block - 1) / block;
  msq::Means means = {*x, heads, tokens, size, order, block, blocks, y};
  msq::share_out(batch * heads * blocks, threads, msq::Means::work, &means);
  return MSQ_OK;
}

int32_t msq_quantize_heads(const MsqOperand* x, const MsqOperand* y, int64_t batch, int64_t heads,
                           int64_t tokens, int64_t size, const int64_t* order, int64_t order_heads,
                           int32_t given, uint8_t* codes, float* scales, int32_t threads) {
  if (!x->data || x->kind != MSQ_FLOATS || (y->kind != MSQ_INT8 && y->kind != MSQ_E4M3) ||
      y->rows < 1 || y->columns < 1 || batch < 0 || heads < 0 || tokens < 0 || size < 0 ||
      size > msq::kMostHeadSize || !codes || !scales || threads < 1 ||
      (order && order_heads != 1 && order_heads != heads))
    return MSQ_BAD_ARGUMENT;
  for (int64_t place = 0; order && place < order_heads * tokens; ++place)
    if (order[place] < 0 || order[place] >= tokens) return MSQ_BAD_ARGUMENT;
  const int64_t blocks = (tokens + y->rows - 1) / y->rows;
  msq::Quantized job = {*x,          *y,     heads,      tokens, size,  order,
                        order_heads, blocks, given != 0, codes,  scales};
  msq::share_out(batch * heads * blocks, threads, msq::Quantized::work, &job);
  return MSQ_OK;
}
