// Block-sparse attention of one slice of queries, for any instruction set.
//
// Scores are held the other way round: keys are rows, queries lie side by side in vectors. So only
// queries are packed, once for all keys that they keep, and keys and values are read where they
// are (sparse_products_impl.h). What softmax needs of a query, its largest score and its sum, are
// lanes of vectors, and no vector is ever reduced.
//
// Keys come in pieces of kPieceKeys. A piece that is not one stretch of floats in memory (it begins
// in one block and ends in another, its tokens are in another order, or it holds codes) is first
// gathered, as floats, and then meets all panels of the slice. Softmax is that of Milakov and
// Gimelshein ("Online normalizer calculation for softmax", 2018) by pieces: sums and outputs so far
// are multiplied by 2^(old - new largest score), as the second product begins.
//
// Where queries and keys are int8 codes their products are sums of bytes, exact; then come scales.

#ifndef MS_QUANT_SPARSE_ATTENTION_IMPL_H_
#define MS_QUANT_SPARSE_ATTENTION_IMPL_H_

#include "attention_operands.h"
#include "pool.h"
#include "sparse_attention.h"
#include "sparse_products_impl.h"

namespace msq {
namespace {

template <class S>
struct SparseAttention : SparseProducts<S> {
  using Base = SparseProducts<S>;
  using Base::fewer;
  using Base::power;
  using Base::V;
  using Base::W;
  using typename Base::F;
  using typename Base::I;
  static constexpr int64_t kPanel = int64_t{W} * V;  // queries
  static constexpr float kHidden = -1e30f;           // the score of a hidden key
  static constexpr float kLowest = -1e29f;           // the largest score of none

  // What one thread holds for a slice.
  struct Held {
    float *queries, *outputs;       // [panel][number][query of it]
    float* scores;                  // [key][query of one panel]
    float *most, *sums, *factors;   // [query]
    float* rows;                    // [query or key][number]
    float* values;                  // [key][number]
    int32_t* words;                 // [panel][four codes][query of it]
    float* query_scales;            // [panel][block of columns][query of it]
    float* key_scales;              // [block of columns][key]
    int32_t *key_words, *key_sums;  // [key][four codes], [block of columns][key]
  };

  struct Slice {
    const MsqBlockAttention& c;
    const AttentionSlice& s;
    const HeadOperand q, k, v;
    Held h;
    bool bytes;       // whether scores are products of bytes
    int64_t words;    // of a row of codes
    int64_t columns;  // blocks of them that have scales
    int64_t queries() const { return s.end - s.begin; }
  };

  // A piece of keys.
  struct Piece {
    const float *keys, *values;
    int64_t key_step, value_step;
    int64_t count;
    KeyRange ranges[kPieceKeys];
    int64_t parts;
  };

  static bool hold(const MsqBlockAttention& c, Slice& slice) {
    const int64_t tall = up_to(kSliceQueries, kPanel), size = up_to(c.size, 4);
    const int64_t floats[] = {tall * size,
                              tall * c.value_size,
                              kPieceKeys * kPanel,
                              tall,
                              tall,
                              tall,
                              tall * size,
                              kPieceKeys * c.value_size,
                              tall * slice.words,
                              tall * slice.columns,
                              kPieceKeys * slice.columns,
                              kPieceKeys * slice.words,
                              kPieceKeys * slice.columns};
    int64_t total = 0;
    for (const int64_t count : floats) total += up_to(count, 16);
    float* at = static_cast<float*>(scratch(0, total * 4));
    if (!at) return false;
    const int64_t* next = floats;
    const auto take = [&] {
      float* here = at;
      at += up_to(*next++, 16);
      return here;
    };
    Held& h = slice.h;
    float** const parts[] = {&h.queries, &h.outputs, &h.scores, &h.most,
                             &h.sums,    &h.factors, &h.rows,   &h.values};
    for (float** part : parts) *part = take();
    h.words = reinterpret_cast<int32_t*>(take());
    h.query_scales = take();
    h.key_scales = take();
    h.key_words = reinterpret_cast<int32_t*>(take());
    h.key_sums = reinterpret_cast<int32_t*>(take());
    return true;
  }

  // Rows where they lie if that is one stretch, else as floats in `room`; and the step from one to
  // the next.
  static const float* gathered(const HeadOperand& h, const KeyRange* ranges, int64_t parts,
                               float* room, int64_t& step) {
    if (parts == 1 && h.in_a_row(ranges[0])) {
      step = h.o.steps.token;
      return h.floats(ranges[0].begin);
    }
    step = h.size;
    float* out = room;
    for (int64_t i = 0; i < parts; ++i) {
      decode(h, ranges[i], out);
      out += (ranges[i].end - ranges[i].begin) * step;
    }
    return room;
  }

  // Queries that lie side by side in a panel: of the last one perhaps less.
  static int64_t wide(int64_t queries) { return queries <= W ? W : kPanel; }

  // Calls f(first query, queries) for each panel.
  template <class Function>
  static void panels(const Slice& t, Function f) {
    for (int64_t first = 0; first < t.queries(); first += kPanel)
      f(first, at_most(kPanel, t.queries() - first));
  }

  static void pack_queries(const Slice& t) {
    const int64_t size = t.c.size;
    const float factor = t.c.scale * 1.44269504f;
    int64_t step;
    const KeyRange slice = {t.s.begin, t.s.end};
    const float* rows = gathered(t.q, &slice, 1, t.h.rows, step);
    panels(t, [&](int64_t first, int64_t count) {
      const int64_t lanes = wide(count);
      transpose(rows + first * step, step, count, size, t.h.queries + first * size, lanes);
      float* out = t.h.queries + first * size;
      for (int64_t i = 0; i < size * lanes; i += W)
        S::store(out + i, S::mul(S::load(out + i), S::set1(factor)));
    });
  }

  // Words of codes as `dot` takes them, and scales with the factor on scores in them.
  static void pack_codes(const Slice& t) {
    const int64_t n = t.words;
    const float factor = t.c.scale * 1.44269504f;
    int32_t* rows = reinterpret_cast<int32_t*>(t.h.rows);
    copy_codes(t.q, {t.s.begin, t.s.end}, n, rows);
    const I bias = S::iset1(static_cast<int32_t>(S::kBias * 0x01010101u));
    panels(t, [&](int64_t first, int64_t count) {
      const int64_t lanes = wide(count);
      int32_t* out = t.h.words + first * n;
      transpose(reinterpret_cast<const float*>(rows + first * n), n, count, n,
                reinterpret_cast<float*>(out), lanes);
      for (int64_t i = 0; i < n * lanes && S::kBias; i += W)  // adding 128 flips the highest bit
        S::istore(out + i, S::ixor(S::iload(out + i), bias));
      float* scales = t.h.query_scales + first * t.columns;
      for (int64_t column = 0; column < t.columns; ++column)
        for (int64_t i = 0; i < lanes; ++i)
          scales[column * lanes + i] =
              i < count ? factor * t.q.scales_of(t.s.begin + first + i)[column] : 0.0f;
    });
  }

  static void begin(const Slice& t) {
    if (t.bytes)
      pack_codes(t);
    else
      pack_queries(t);
    const int64_t tall = up_to(t.queries(), kPanel);
    for (int64_t i = 0; i < tall; ++i) {
      t.h.most[i] = kLowest;
      t.h.sums[i] = 0.0f;
    }
    memset(t.h.outputs, 0, static_cast<size_t>(tall * t.c.value_size * 4));
  }

  // Keys and values of a piece where they lie, or gathered.
  static void find(const Slice& t, Piece& p) {
    p.values = gathered(t.v, p.ranges, p.parts, t.h.values, p.value_step);
    if (!t.bytes) {
      p.keys = gathered(t.k, p.ranges, p.parts, t.h.rows, p.key_step);
      return;
    }
    int64_t at = 0;
    for (int64_t i = 0; i < p.parts; ++i)
      for (int64_t key = p.ranges[i].begin; key < p.ranges[i].end; ++key, ++at) {
        copy_codes(t.k, {key, key + 1}, t.words, t.h.key_words + at * t.words);
        for (int64_t column = 0; column < t.columns; ++column) {
          t.h.key_scales[column * kPieceKeys + at] = t.k.scales_of(key)[column];
          t.h.key_sums[column * kPieceKeys + at] =
              S::kBias ? S::kBias * sum_of_codes(t.h.key_words + at * t.words, t.words, column,
                                                 t.c.k.columns)
                       : 0;
        }
      }
  }

  template <int N, int M = S::kRows>
  static void all_bytes(const Slice& t, int64_t first, int64_t key, int64_t count) {
    const int64_t words = t.columns == 1 ? t.words : t.c.q.columns / 4;
    for (; count >= M; count -= M, key += M)
      for (int64_t column = 0; column < t.columns; ++column) {
        const int64_t at = column * words;
        Base::template bytes<M, N>(
            t.h.key_words + key * t.words + at, t.words, t.h.words + first * t.words + at * N * W,
            at_most(words, t.words - at), t.h.key_sums + column * kPieceKeys + key,
            t.h.key_scales + column * kPieceKeys + key,
            t.h.query_scales + first * t.columns + column * N * W, column > 0,
            t.h.scores + key * N * W);
      }
    if constexpr (M > 1)
      if (count) all_bytes<N, fewer(M)>(t, first, key, count);
  }

  // Hides keys that are farther from a query than the band reaches.
  template <int N>
  static void hide(const Slice& t, const Piece& p, int64_t first) {
    const F band = S::set1(static_cast<float>(t.s.band));
    alignas(64) float lanes[N * W];
    for (int64_t i = 0; i < N * W; ++i) lanes[i] = static_cast<float>(i);
    int64_t at = 0;
    for (int64_t i = 0; i < p.parts; ++i)
      for (int64_t key = p.ranges[i].begin; key < p.ranges[i].end; ++key, ++at) {
        const int64_t from = key - t.s.begin - first;  // in lanes
        if (key < t.c.first || (from <= t.s.band && N * W - 1 - from <= t.s.band)) continue;
        const F here = S::set1(static_cast<float>(from));
        each<N>([&](auto v) __attribute__((always_inline)) {
          float* score = t.h.scores + (at * N + v) * W;
          const F reach = S::sub(band, S::abs(S::sub(S::load(lanes + v * W), here)));
          const F hidden = S::mul(S::min(reach, S::set1(0.0f)), S::set1(-kHidden));
          S::store(score, S::add(S::zero_below(S::load(score), reach, 0.0f), hidden));
        });
      }
  }

  // Scores become powers of two beside the largest so far.
  template <int N>
  static void soften(const Slice& t, const Piece& p, int64_t first) {
    F most[N], sums[N];
    float* scores = t.h.scores;
    each<N>([&](auto v) __attribute__((always_inline)) {
      most[v] = S::load(t.h.most + first + v * W);
      sums[v] = S::set1(0.0f);
    });
    for (int64_t key = 0; key < p.count; ++key)
      each<N>([&](auto v) __attribute__((always_inline)) {
        most[v] = S::max(most[v], S::load(scores + (key * N + v) * W));
      });
    for (int64_t key = 0; key < p.count; ++key)
      each<N>([&](auto v) __attribute__((always_inline)) {
        float* at = scores + (key * N + v) * W;
        const F y = power(S::sub(S::load(at), most[v]));
        S::store(at, y);
        sums[v] = S::add(sums[v], y);
      });
    each<N>([&](auto v) __attribute__((always_inline)) {
      const int64_t at = first + v * W;
      const F by = power(S::sub(S::load(t.h.most + at), most[v]));
      S::store(t.h.sums + at, S::fma(S::load(t.h.sums + at), by, sums[v]));
      S::store(t.h.factors + at, by);
      S::store(t.h.most + at, most[v]);
    });
  }

  template <int N>
  static void meet(const Slice& t, const Piece& p, int64_t first) {
    const int64_t size = t.c.size, values = t.c.value_size;
    if (t.bytes)
      all_bytes<N>(t, first, 0, p.count);
    else
      Base::template products<N>(p.count, p.keys, p.key_step, 1, t.h.queries + first * size, size,
                                 nullptr, t.h.scores);
    if (t.s.band >= 0) hide<N>(t, p, first);
    soften<N>(t, p, first);
    Base::template products<N>(values, p.values, 1, p.value_step, t.h.scores, p.count,
                               t.h.factors + first, t.h.outputs + first * values);
  }

  static void finish(const Slice& t) {
    const int64_t size = t.c.value_size, step = t.c.y_steps.token;
    const int64_t* order = order_of(t.c, t.s.head);
    const bool apart = order || step != size;
    float* y = t.c.y + t.s.batch * t.c.y_steps.batch + t.s.head * t.c.y_steps.head;
    panels(t, [&](int64_t first, int64_t count) {
      const int64_t lanes = wide(count);
      float *out = t.h.outputs + first * size, *by = t.h.factors + first;
      for (int64_t i = 0; i < lanes; ++i) {
        const float sum = t.h.sums[first + i];
        by[i] = sum == 0.0f ? 0.0f : 1.0f / sum;  // a query that keeps no key has zeros
      }
      for (int64_t d = 0; d < size; ++d)
        for (int64_t i = 0; i < lanes; i += W) {
          float* at = out + d * lanes + i;
          S::store(at, S::mul(S::load(at), S::load(by + i)));
        }
      const int64_t place = t.s.begin + first;
      float* to = apart ? t.h.values : y + place * step;
      transpose(out, lanes, size, count, to, size);
      for (int64_t i = 0; apart && i < count; ++i)
        memcpy(y + (order ? order[place + i] : place + i) * step, to + i * size,
               static_cast<size_t>(4 * size));
    });
  }

  // Blocks of columns are words of codes, the same of both.
  static bool by_bytes(const MsqBlockAttention& c) {
    return c.q.kind == MSQ_INT8 && c.k.kind == MSQ_INT8 && c.q.columns == c.k.columns &&
           (c.q.columns % 4 == 0 || c.q.columns >= c.size);
  }

  static bool attend(const MsqBlockAttention& c, const AttentionSlice& s) {
    const auto head = [&](const MsqOperand& o, int64_t tokens, int64_t size) {
      return HeadOperand(o, c, s.batch, s.head, tokens, size);
    };
    Slice t = {c,
               s,
               head(c.q, c.queries, c.size),
               head(c.k, c.keys, c.size),
               head(c.v, c.keys, c.value_size),
               {},
               by_bytes(c),
               0,
               0};
    if (t.bytes) {
      t.words = up_to(c.size, 4) / 4;
      t.columns = (c.size + c.q.columns - 1) / c.q.columns;
    }
    if (!hold(c, t)) return false;
    begin(t);
    int64_t range = 0, from = s.count ? s.ranges[0].begin : 0;
    while (range < s.count) {
      Piece p;
      p.count = p.parts = 0;
      while (range < s.count && p.count < kPieceKeys) {
        const int64_t end = at_most(s.ranges[range].end, from + kPieceKeys - p.count);
        p.ranges[p.parts++] = {from, end};
        p.count += end - from;
        from = end;
        if (from == s.ranges[range].end && ++range < s.count) from = s.ranges[range].begin;
      }
      find(t, p);
      panels(t, [&](int64_t first, int64_t count) {
        if (count <= W)
          meet<1>(t, p, first);
        else
          meet<V>(t, p, first);
      });
    }
    finish(t);
    return true;
  }
};

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_SPARSE_ATTENTION_IMPL_H_
