// Statistics of the columns of an activation: range, squares and magnitudes in one pass.
//
// The compiler makes vectors of these loops. A tile of 256 columns keeps its statistics in the
// first cache while all rows go by, and each column adds its rows in order, so every instruction
// set gives the same bits.

#ifndef MS_QUANT_COLUMN_STATS_H_
#define MS_QUANT_COLUMN_STATS_H_

#include <stdint.h>
#include <string.h>

#include "blob.h"
#include "pool.h"

namespace msq {
namespace {

constexpr int64_t kTileColumns = 256;

template <bool WHOLE>
void column_tile(ColumnStats& c, int64_t first) {
  const int64_t n = WHOLE ? kTileColumns : c.columns - first;
  float low[kTileColumns], high[kTileColumns];
  double squares[kTileColumns] = {}, sizes[kTileColumns] = {};
  float odd[kTileColumns] = {};  // NaN where something is NaN or infinite
  for (int64_t i = 0; i < n; ++i) {
    low[i] = c.low[first + i];
    high[i] = c.high[first + i];
  }
  const float* x = c.x + first;
  for (int64_t row = 0; row < c.rows; ++row, x += c.columns)
    for (int64_t i = 0; i < n; ++i) {
      const float v = x[i];
      const double wide = static_cast<double>(v);
      odd[i] += v - v;
      low[i] = v < low[i] ? v : low[i];
      high[i] = v > high[i] ? v : high[i];
      squares[i] += wide * wide;
      sizes[i] += __builtin_fabs(wide);
    }
  for (int64_t i = 0; i < n; ++i) {
    c.low[first + i] = low[i];
    c.high[first + i] = high[i];
    c.squares[first + i] += squares[i];
    c.sizes[first + i] += sizes[i];
    if (odd[i] != 0) __atomic_store_n(&c.not_finite, true, __ATOMIC_RELAXED);
  }
}

inline void column_piece(void* job, int64_t index) {
  ColumnStats& c = *static_cast<ColumnStats*>(job);
  const int64_t first = index * kTileColumns;
  if (c.columns - first >= kTileColumns)
    column_tile<true>(c, first);
  else
    column_tile<false>(c, first);
}

inline void column_stats(ColumnStats& stats, int threads) {
  share_out((stats.columns + kTileColumns - 1) / kTileColumns, threads, column_piece, &stats);
}

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_COLUMN_STATS_H_
