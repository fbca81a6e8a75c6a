// What a step of generation computes for several sequences at once, so that no number of one
// depends on which others there are.
//
// A library's product takes other sums for one row than for many. Here the sum of an output and a
// row is always taken in the same order, four vectors of partial sums along the inputs, whether the
// weight's row meets one row of inputs or the next few with it. Attention goes through each
// sequence's own keys and values, one key-value head of one sequence a piece.

#ifndef MS_QUANT_STEP_IMPL_H_
#define MS_QUANT_STEP_IMPL_H_

#include "block_impl.h"

namespace msq {
namespace {

template <class S>
struct StepOps {
  using F = typename S::F;
  using Block = BlockOps<S>;
  static constexpr int W = S::kWidth;
  static constexpr int kMost = W >= 16 ? 4 : 2;  // rows whose sums stay in registers
  static constexpr int64_t kPiece = 1 << 15;     // weights of one piece of a job
  static constexpr int64_t kFar = 2048;          // bytes that are asked for before they are needed

  static F load(const float* p) { return S::load(p); }
  static F load(const uint16_t* p) { return S::load_bfloat16(p); }
  static float value(float x) { return x; }
  static float value(uint16_t half) { return of_bfloat16(half); }

  // Rows [row, row + M) times a row of the weight.
  template <int M, class T>
  static void some_rows(const RowProducts& c, const T* w, int64_t row, int64_t output) {
    const int64_t n = c.inputs;
    const float* x = c.x + row * n;
    F sums[M][4];
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<4>([&](auto i) __attribute__((always_inline)) { sums[m][i] = S::set1(0.0f); });
    });
    int64_t k = 0;
    for (; k + 4 * W <= n; k += 4 * W) {
      const char* ahead = reinterpret_cast<const char*>(w + k) + kFar;
      each<(4 * W * int{sizeof(T)} + 63) / 64>(
          [&](auto i) __attribute__((always_inline)) { S::prefetch(ahead + i * 64); });
      each<4>([&](auto i) __attribute__((always_inline)) {
        const F by = load(w + k + i * W);
        each<M>([&](auto m) __attribute__((always_inline)) {
          sums[m][i] = S::fma(by, S::load(x + m * n + k + i * W), sums[m][i]);
        });
      });
    }
    for (int m = 0; m < M; ++m) {
      float sum =
          Block::sum_of(S::add(S::add(sums[m][0], sums[m][1]), S::add(sums[m][2], sums[m][3])));
      for (int64_t i = k; i < n; ++i) sum += value(w[i]) * x[m * n + i];
      c.y[(row + m) * c.outputs + output] = c.bias ? sum + c.bias[output] : sum;
    }
  }

  template <int M, class T>
  static void last_rows(const RowProducts& c, const T* w, int64_t row, int64_t output) {
    if constexpr (M > 0) {
      if (c.rows - row == M) return some_rows<M>(c, w, row, output);
      last_rows<M - 1>(c, w, row, output);
    }
  }

  template <class T>
  static void products_piece(void* job, int64_t index) {
    const RowProducts& c = *static_cast<RowProducts*>(job);
    const int64_t each = outputs_of_piece(c.inputs);
    for (int64_t o = index * each; o < at_most(c.outputs, (index + 1) * each); ++o) {
      const T* w = static_cast<const T*>(c.w) + o * c.inputs;
      int64_t row = 0;
      for (; row + kMost <= c.rows; row += kMost) some_rows<kMost>(c, w, row, o);
      last_rows<kMost - 1>(c, w, row, o);
    }
  }

  static int64_t outputs_of_piece(int64_t inputs) {
    return inputs < kPiece / 8 ? kPiece / inputs : 8;
  }

  static void row_products(RowProducts& c, int threads) {
    const int64_t each = outputs_of_piece(c.inputs);
    share_out((c.outputs + each - 1) / each, threads,
              c.bfloat16 ? products_piece<uint16_t> : products_piece<float>, &c);
  }

  static float dot(const float* a, const float* b, int64_t n) {
    F sum = S::set1(0.0f);
    for (int64_t k = 0; k < n; k += W)
      sum = S::fma(Block::part_of(a + k, n - k, 0), Block::part_of(b + k, n - k, 0), sum);
    return Block::sum_of(sum);
  }

  // y = sum of weights[t] times the row t of `values`, times `by`; from column `at` on, 4 vectors.
  static void mix(const float* weights, int64_t length, const float* values, int64_t size,
                  int64_t at, float by, float* y) {
    F sums[4];
    each<4>([&](auto i) __attribute__((always_inline)) { sums[i] = S::set1(0.0f); });
    if (at + 4 * W <= size) {
      for (int64_t t = 0; t < length; ++t) {
        const F weight = S::set1(weights[t]);
        each<4>([&](auto i) __attribute__((always_inline)) {
          sums[i] = S::fma(weight, S::load(values + t * size + at + i * W), sums[i]);
        });
      }
    } else {
      for (int64_t t = 0; t < length; ++t)
        for (int i = 0; i < 4 && at + i * W < size; ++i) {
          const F v = Block::part_of(values + t * size + at + i * W, size - at - i * W, 0);
          sums[i] = S::fma(S::set1(weights[t]), v, sums[i]);
        }
    }
    for (int i = 0; i < 4 && at + i * W < size; ++i)
      Block::put_part(y + at + i * W, S::mul(sums[i], S::set1(by)), size - at - i * W);
  }

  // One key-value head of one sequence.
  static void attention_piece(void* job, int64_t index) {
    MsqStepAttention& c = *static_cast<MsqStepAttention*>(job);
    const int64_t sequence = index / c.kv_heads, head = index % c.kv_heads;
    const int64_t group = c.heads / c.kv_heads, length = c.lengths[sequence];
    const float* keys = c.keys[sequence] + head * c.key_strides[sequence];
    const float* values = c.values[sequence] + head * c.value_strides[sequence];
    float* scores = static_cast<float*>(scratch(0, group * length * 4));
    if (!scores) {
      __atomic_store_n(&c.failed, 1, __ATOMIC_RELAXED);
      return;
    }
    const int64_t first = sequence * c.heads + head * group;
    for (int64_t t = 0; t < length; ++t)
      for (int64_t g = 0; g < group; ++g)
        scores[g * length + t] =
            c.scale * dot(c.q + (first + g) * c.size, keys + t * c.size, c.size);
    for (int64_t g = 0; g < group; ++g) {
      float* row = scores + g * length;
      F most = S::set1(-3.0e38f);
      for (int64_t k = 0; k < length; k += W)
        most = S::max(most, Block::part_of(row + k, length - k, -3e38f));
      const float by = 1.0f / Block::powers(row, length, S::highest(most), row, kWords);
      for (int64_t at = 0; at < c.value_size; at += 4 * W)
        mix(row, length, values, c.value_size, at, by, c.y + (first + g) * c.value_size);
    }
  }

  static void attention(MsqStepAttention& c, int threads) {
    share_out(c.sequences * c.kv_heads, threads, attention_piece, &c);
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_STEP_IMPL_H_
