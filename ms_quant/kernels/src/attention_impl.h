// Attention of many queries: softmax(q k^T * scale + mask) v, head by head.
//
// Keys and values are packed once into panels, as weights are that are held as floats. Then 48
// queries of a head go through them together: scores, softmax and the product with the values, so
// that no more than 48 rows of scores are ever in memory. The softmax writes its powers in the
// order in which the second product reads them; one over their sum multiplies the result instead.

#ifndef MS_QUANT_ATTENTION_IMPL_H_
#define MS_QUANT_ATTENTION_IMPL_H_

#include "block_impl.h"
#include "linear_impl.h"
#include "sparse_attention_impl.h"
#include "step_impl.h"
#include "stored_rows_impl.h"

namespace msq {
namespace {

template <class S>
struct Attend {
  using L = WidenedLinear<S>;
  static constexpr int R = L::R;
  static constexpr int64_t kColumns = L::kColumns;
  static constexpr int64_t kBlocks = 48 / R;  // of queries that go through all keys together
  static constexpr int64_t kQueries = kBlocks * R;
  static constexpr int64_t kMostKeys = 512;  // whose values are multiplied at a time
  static constexpr float kHidden = -1e29f;   // a masked key has less

  struct Job : Attention {
    int64_t slices;         // of queries
    int64_t depth, padded;  // size and total in whole blocks
    int64_t key_panels, value_panels;
    float *keys, *values;  // [batch][kv head][panel][...][column of it]
    int64_t* seen;         // [mask][slice]: keys up to the last that a query may look at
    bool failed = false;

    explicit Job(const Attention& a) : Attention(a) {
      slices = (length + kQueries - 1) / kQueries;
      depth = up_to(size, kWords);
      padded = up_to(total, kWords);
      key_panels = (total + kColumns - 1) / kColumns;
      value_panels = (size + kColumns - 1) / kColumns;
    }
    int64_t keys_of_head() const { return key_panels * depth * kColumns; }
    int64_t values_of_head() const { return value_panels * padded * kColumns; }
  };

  static void pack_head(void* job, int64_t index) {
    Job& j = *static_cast<Job*>(job);
    const float *k = j.k + index * j.total * j.size, *v = j.v + index * j.total * j.size;
    float* out = j.keys + index * j.keys_of_head();
    for (int64_t panel = 0; panel < j.key_panels; ++panel) {
      const int64_t first = panel * kColumns, count = at_most(kColumns, j.total - first);
      for (int64_t d = 0; d < j.depth; ++d, out += kColumns)
        for (int64_t i = 0; i < kColumns; ++i)
          out[i] = i < count && d < j.size ? k[(first + i) * j.size + d] : 0.0f;
    }
    out = j.values + index * j.values_of_head();
    for (int64_t panel = 0; panel < j.value_panels; ++panel) {
      const int64_t first = panel * kColumns, count = at_most(kColumns, j.size - first);
      for (int64_t t = 0; t < j.padded; ++t, out += kColumns)
        for (int64_t i = 0; i < kColumns; ++i)
          out[i] = i < count && t < j.total ? v[t * j.size + first + i] : 0.0f;
    }
  }

  // A query that sees nothing has the mean of all values.
  static int64_t seen_by(const float* mask, int64_t total) {
    int64_t n = total;
    while (n > 0 && !(mask[n - 1] > kHidden)) --n;
    return n ? n : total;
  }

  static void look(void* job, int64_t index) {
    Job& j = *static_cast<Job*>(job);
    const int64_t first = index % j.slices * kQueries, end = at_most(first + kQueries, j.length);
    const float* mask = j.mask + index / j.slices * j.length * j.total;
    int64_t most = 0;
    for (int64_t row = first; row < end; ++row) {
      const int64_t n = seen_by(mask + row * j.total, j.total);
      most = n > most ? n : most;
    }
    j.seen[index] = most;
  }

  // Rows in blocks as WidenedLinear reads them: [block][16 numbers][row of it][number of the
  // 16].
  static void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t n, float* out) {
    for (int64_t first = 0; first < rows; first += R) {
      const int64_t count = at_most(R, rows - first);
      for (int64_t k = 0; k < n; k += kWords)
        for (int64_t r = first; r < first + count; ++r, out += kWords)
          for (int64_t i = 0; i < kWords; ++i) out[i] = k + i < n ? x[r * stride + k + i] : 0.0f;
    }
  }

  // `count` numbers of a row of sums, times a factor.
  static void put(const float* sums, float factor, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += S::kWidth)
      BlockOps<S>::put_part(y + i, S::mul(S::load(sums + i), S::set1(factor)), count - i);
  }

  // One head of a slice of queries.
  static void slice(void* job, int64_t index) {
    Job& j = *static_cast<Job*>(job);
    const int64_t first = index % j.slices * kQueries, head = index / j.slices % j.heads;
    const int64_t b = index / j.slices / j.heads, mask = j.masks > 1 ? b : 0;
    const int64_t rows = at_most(kQueries, j.length - first);
    const int64_t n = j.seen[mask * j.slices + first / kQueries], stride = up_to(n, kColumns);
    float* queries = static_cast<float*>(scratch(3, kQueries * j.depth * 4));
    float* scores = static_cast<float*>(scratch(4, kQueries * stride * 4));
    float* weights = static_cast<float*>(scratch(5, kQueries * up_to(n, kWords) * 4));
    if (!queries || !scores || !weights) {
      j.failed = true;
      return;
    }
    const int64_t kv = b * j.kv_heads + head / (j.heads / j.kv_heads);
    pack_rows(j.q + ((b * j.heads + head) * j.length + first) * j.size, j.size, rows, j.size,
              queries);
    score(j, queries, rows, j.keys + kv * j.keys_of_head(), scores, stride);
    float inverse[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      const float* seen = j.mask + (mask * j.length + first + r) * j.total;
      inverse[r] = soften(j, scores + r * stride, seen, rows, r, n, weights);
    }
    float* y = j.y + ((b * j.length + first) * j.heads + head) * j.size;
    mix(j, weights, inverse, rows, n, j.values + kv * j.values_of_head(), y);
  }

  // Writes the powers of row r as WidenedLinear reads them, and returns one over their sum.
  static float soften(const Job& j, float* x, const float* mask, int64_t rows, int64_t r, int64_t n,
                      float* weights) {
    const int64_t first = r / R * R, stride = at_most(R, rows - first) * kWords;
    float* out = weights + first * up_to(n, kWords) + (r - first) * kWords;
    for (int64_t k = n; k < up_to(n, kWords); ++k) out[k / kWords * stride + k % kWords] = 0.0f;
    const float top = BlockOps<S>::masked(x, mask, n, j.scale);
    return 1.0f / BlockOps<S>::powers(x, n, top, out, stride);
  }

  static void score(const Job& j, const float* queries, int64_t rows, const float* keys,
                    float* scores, int64_t stride) {
    alignas(64) float sums[R * kColumns];
    for (int64_t at = 0; at < stride; at += kColumns, keys += j.depth * kColumns)
      for (int64_t first = 0; first < rows; first += R) {
        const int64_t count = at_most(R, rows - first);
        L::template some_rows<R>(count, queries + first * j.depth, keys, j.depth, sums, false);
        for (int64_t r = 0; r < count; ++r)
          put(sums + r * kColumns, 1.0f, kColumns, scores + (first + r) * stride + at);
      }
  }

  static void mix(const Job& j, const float* weights, const float* inverse, int64_t rows, int64_t n,
                  const float* values, float* y) {
    alignas(64) float sums[kBlocks][R * kColumns];
    const int64_t whole = up_to(n, kWords);
    for (int64_t at = 0; at < j.size; at += kColumns, values += j.padded * kColumns) {
      for (int64_t begin = 0; begin < whole; begin += kMostKeys)
        for (int64_t first = 0; first < rows; first += R) {
          const int64_t count = at_most(R, rows - first);
          L::template some_rows<R>(count, weights + first * whole + begin * count,
                                   values + begin * kColumns, at_most(kMostKeys, whole - begin),
                                   sums[first / R], begin > 0);
        }
      for (int64_t r = 0; r < rows; ++r)
        put(sums[r / R] + r % R * kColumns, inverse[r], at_most(kColumns, j.size - at),
            y + r * j.heads * j.size + at);
    }
  }

  static bool attend(const Attention& attention, int threads) {
    Job j(attention);
    const int64_t pairs = j.batch * j.kv_heads;
    j.keys = static_cast<float*>(scratch(0, pairs * j.keys_of_head() * 4));
    j.values = static_cast<float*>(scratch(1, pairs * j.values_of_head() * 4));
    j.seen = static_cast<int64_t*>(scratch(2, j.masks * j.slices * 8));
    if (!j.keys || !j.values || !j.seen) return false;
    share_out(pairs, threads, pack_head, &j);
    share_out(j.masks * j.slices, threads, look, &j);
    share_out(j.batch * j.heads * j.slices, threads, slice, &j);
    return !j.failed;
  }
};

template <class S>
const Kernels* all_kernels() {
  static const Kernels found = {Linear<S>::kColumns,
                                S::kBias,
                                Linear<S>::linear,
                                Quantize<S>::quantize_rows,
                                Stored<S>::quantize,
                                BlockOps<S>::rms_norm,
                                BlockOps<S>::swiglu,
                                BlockOps<S>::rope,
                                BlockOps<S>::softmax,
                                Attend<S>::attend,
                                column_stats,
                                StepOps<S>::row_products,
                                StepOps<S>::attention,
                                Linear<S>::kRowsAlike,
                                SparseAttention<S>::attend};
  return &found;
}

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_ATTENTION_IMPL_H_
