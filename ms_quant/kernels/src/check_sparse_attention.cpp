#include "check_sparse_attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <utility>
#include <vector>

#include "check_problem.h"
#include "kernels.h"

namespace check {
namespace {

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of arrays (batch, heads, tokens, size) or (batch, tokens, heads, size).
MsqSteps some_steps(int64_t heads, int64_t tokens, int64_t size) {
  const bool heads_first = below(2);
  return {heads * tokens * size, (heads_first ? tokens : 1) * size,
          (heads_first ? 1 : heads) * size};
}

// An operand with arrays of just the sizes that it has, so that a sanitizer sees what reads on.
struct Operand {
  std::vector<float> floats, scales;
  std::vector<uint8_t> codes;
  MsqOperand operand = {};

  Operand(int64_t batch, int64_t heads_of_one, int64_t tokens, int64_t size, int32_t kind,
          int64_t columns) {
    const int64_t heads = batch * heads_of_one;
    operand.kind = kind;
    operand.steps = some_steps(heads_of_one, tokens, size);
    if (kind == MSQ_FLOATS) {
      floats = normals(heads * tokens * size);
      operand.data = floats.data();
      return;
    }
    operand.rows = 1 + below(200);
    operand.columns = columns;
    codes.resize(static_cast<size_t>(heads * tokens * size));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(below(256));
    for (uint8_t& code : codes)
      if (kind == MSQ_E4M3 && (code & 127) == 127) code = 0;  // NaN
    scales = positive(heads * ceiling(tokens, operand.rows) * ceiling(size, columns));
    for (float& scale : scales) scale *= kind == MSQ_INT8 ? 1e-2f : 1e-3f;
    operand.data = codes.data();
    operand.scales = scales.data();
  }
};

std::vector<uint8_t> bits(int64_t count, int64_t of_ten) {
  std::vector<uint8_t> made(static_cast<size_t>(count));
  for (uint8_t& bit : made) bit = below(10) < of_ten;
  return made;
}

// Each token of each head once, in any order.
std::vector<int64_t> orders(int64_t heads, int64_t tokens) {
  std::vector<int64_t> made;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t token = 0; token < tokens; ++token) {
      made.push_back(token);
      std::swap(made.back(), made[static_cast<size_t>(head * tokens + below(token + 1))]);
    }
  return made;
}

}  // namespace

void check_sparse_attention(int isa) {
  MsqBlockAttention c = {};
  c.batch = 1 + below(2);
  c.heads = 1 + below(3);
  c.queries = below(200);
  c.keys = below(2) ? c.queries : below(200);
  c.size = 1 + below(70);
  c.value_size = 1 + below(70);
  const int64_t heads = c.batch * c.heads, columns = 4 * (1 + below(20)), bytes = below(2);
  const auto kind = [&] { return bytes ? int32_t{MSQ_INT8} : static_cast<int32_t>(below(3)); };
  const Operand q(c.batch, c.heads, c.queries, c.size, kind(), columns),
      k(c.batch, c.heads, c.keys, c.size, kind(), columns),
      v(c.batch, c.heads, c.keys, c.value_size, static_cast<int32_t>(below(3)),
        below(2) ? 1 : columns);
  // An empty vector may have no address.
  const float none = 0;
  const auto operand = [&](const Operand& o) {
    MsqOperand made = o.operand;
    if (!made.data) made.data = &none;
    if (!made.scales) made.scales = &none;
    return made;
  };
  c.q = operand(q);
  c.k = operand(k);
  c.v = operand(v);
  c.block_batches = below(2) ? 1 : c.batch;
  c.block_heads = below(2) ? 1 : c.heads;
  c.block_queries = 1 + below(150);
  c.block_keys = 1 + below(150);
  const std::vector<uint8_t> blocks = bits(c.block_batches * c.block_heads *
                                               ceiling(c.queries, c.block_queries) *
                                               ceiling(c.keys, c.block_keys),
                                           below(11)),
                             kept = bits(c.batch * c.keys, 5 + below(6));
  if (below(2)) c.blocks = blocks.data();
  if (below(2)) c.kept = kept.data();
  std::vector<int64_t> band(static_cast<size_t>(c.heads));
  for (int64_t& width : band) width = below(60) - 1;
  if (below(2)) c.band = band.data();
  c.first = below(2) ? below(60) : 0;
  std::vector<int64_t> leading(static_cast<size_t>(c.heads));
  for (int64_t& keys : leading) keys = below(c.keys + 20) - 1;
  if (below(3) == 0) c.leading = leading.data();
  c.order_heads = below(2) ? 1 : c.heads;
  const std::vector<int64_t> order = orders(c.order_heads, c.keys);
  if (c.keys == c.queries && below(2)) c.order = order.data();
  c.y_steps = some_steps(c.heads, c.queries, c.value_size);
  c.scale = 0.2f;
  const size_t count = static_cast<size_t>(heads * c.queries * c.value_size);
  std::vector<float> found[3];
  const int isas[3] = {MSQ_SCALAR, isa, isa}, threads[3] = {1, 1, 3};
  for (int i = 0; i < 3; ++i) {
    found[i].resize(count + 1, NAN);
    c.y = found[i].data();
    const int status = msq_block_attention(isas[i], &c, threads[i]);
    if (status) exit(printf("block_attention: status %d\n", status));
  }
  for (size_t i = 0; i < count; ++i) {
    const float a = found[1][i], b = found[0][i];
    if (fabsf(a - b) <= 1e-3f * fabsf(b) + 1e-3f && a == found[2][i]) continue;
    printf("%d, block_attention: [%zu] is %.9g and %.9g, expected %.9g\n", isa, i, a, found[2][i],
           b);
    exit(1);
  }
}

void check_block_means() {
  const int64_t batch = 1 + below(2), heads = 1 + below(3), tokens = below(100), size = below(40),
                block = 1 + below(50), blocks = ceiling(tokens, block);
  const Operand x(batch, heads, tokens, size, MSQ_FLOATS, 1);
  const std::vector<int64_t> order = orders(1, tokens);
  const bool placed = below(2);
  std::vector<float> found(static_cast<size_t>(batch * heads * blocks * size + 1), NAN);
  const float none = 0;
  MsqOperand operand = x.operand;
  if (!operand.data) operand.data = &none;
  const int status = msq_block_means(&operand, batch, heads, tokens, size,
                                     placed ? order.data() : nullptr, block, found.data(), 2);
  if (status) exit(printf("block_means: status %d\n", status));
  for (int64_t head = 0; head < batch * heads; ++head)
    for (int64_t i = 0; i < blocks * size; ++i) {
      const int64_t begin = i / size * block, end = begin + block < tokens ? begin + block : tokens;
      double sum = 0;
      for (int64_t place = begin; place < end; ++place) {
        const int64_t token = placed ? order[static_cast<size_t>(place)] : place;
        sum += x.floats[static_cast<size_t>(head / heads * x.operand.steps.batch +
                                            head % heads * x.operand.steps.head +
                                            token * x.operand.steps.token + i % size)];
      }
      const float mean = found[static_cast<size_t>(head * blocks * size + i)];
      if (fabs(mean - sum / static_cast<double>(end - begin)) <= 1e-5) continue;
      printf("block_means: %.9g, expected %.9g\n", mean, sum / static_cast<double>(end - begin));
      exit(1);
    }
}

void check_quantize_heads() {
  const int64_t batch = 1 + below(2), heads = 1 + below(3), tokens = below(100), size = below(40);
  const Operand x(batch, heads, tokens, size, MSQ_FLOATS, 1);
  MsqOperand operand = x.operand, kind = {};
  kind.kind = below(2) ? MSQ_INT8 : MSQ_E4M3;
  kind.rows = 1 + below(120);
  kind.columns = 1 + below(50);
  const int64_t order_heads = below(2) ? 1 : heads, columns = ceiling(size, kind.columns),
                rows = ceiling(tokens, kind.rows);
  const std::vector<int64_t> order = orders(order_heads, tokens);
  const bool placed = below(2);
  std::vector<uint8_t> codes(static_cast<size_t>(batch * heads * tokens * size + 1));
  std::vector<float> scales(static_cast<size_t>(batch * heads * rows * columns + 1), NAN);
  const float none = 0;
  if (!operand.data) operand.data = &none;
  const int status = msq_quantize_heads(&operand, &kind, batch, heads, tokens, size,
                                        placed ? order.data() : nullptr, order_heads, 0,
                                        codes.data(), scales.data(), 2);
  if (status) exit(printf("quantize_heads: status %d\n", status));
  for (int64_t i = 0; i < batch * heads * tokens * size; ++i) {
    const int64_t head = i / size / tokens, place = i / size % tokens, column = i % size;
    const int64_t at = (placed && order_heads > 1 ? head % heads * tokens : 0) + place;
    const int64_t token = placed ? order[static_cast<size_t>(at)] : place;
    const double number = x.floats[static_cast<size_t>(head / heads * x.operand.steps.batch +
                                                       head % heads * x.operand.steps.head +
                                                       token * x.operand.steps.token + column)];
    const double scale = scales[static_cast<size_t>((head * rows + place / kind.rows) * columns +
                                                    column / kind.columns)];
    const uint8_t code = codes[static_cast<size_t>(i)];
    const int exponent = code >> 3 & 15;
    const double normal = ldexp(8 + (code & 7), exponent - 10), subnormal = ldexp(code & 7, -9);
    const double found = kind.kind == MSQ_INT8
                             ? static_cast<int8_t>(code)
                             : (code & 128 ? -1.0 : 1.0) * (exponent ? normal : subnormal);
    const double step = kind.kind == MSQ_INT8 ? 1
                        : exponent            ? ldexp(1, exponent - 10)
                                              : ldexp(1, -9);
    if (fabs(found * scale - number) <= 0.5001 * step * scale) continue;
    printf("quantize_heads: %.9g, expected %.9g\n", found * scale, number);
    exit(1);
  }
}

}  // namespace check
