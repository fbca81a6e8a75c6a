// Means of blocks of tokens, by which rules of sparse attention choose what is computed.

#include <string.h>

#include <algorithm>

#include "kernels.h"
#include "pool.h"

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
