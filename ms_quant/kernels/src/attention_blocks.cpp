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

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// All bits, if a is below b, for numbers below 2^31. Comparing floats, that the compiler must not
// do for lanes that are left out, would keep it from making vectors of what follows.
inline uint32_t if_below(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<int32_t>(a - b) >> 31);
}

inline uint32_t smaller(uint32_t a, uint32_t b) {
  const uint32_t below = if_below(a, b);
  return (a & below) | (b & ~below);
}

// Half to even, within the range of int8.
inline uint8_t to_int8(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 31;
  const uint32_t limit = 0x42fe0000u + (sign << 17);  // 127 or 128
  const uint32_t size = smaller(bits & 0x7fffffffu, limit);
  const float clipped = float_of(size | sign << 31);
  return static_cast<uint8_t>(bits_of(clipped + 0x1.8p23f));  // its last bits are the number
}

// Half to even, up to 448.
inline uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 24 & 128u;
  const uint32_t size = smaller(bits & 0x7fffffffu, 0x43e00000u);
  const uint32_t normal = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
  const uint32_t subnormal = bits_of(float_of(size) + 0x1p14f) - 0x46800000u;  // steps of 2^-9
  const uint32_t small = if_below(size, 0x3c800000u);                          // 2^-6
  return static_cast<uint8_t>(sign | (subnormal & small) | (normal & ~small));
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
