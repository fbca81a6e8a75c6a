// Block-sparse attention: what its plan (sparse_attention.cpp, the same for all) hands to an
// instruction set (sparse_attention_impl.h).

#ifndef MS_QUANT_SPARSE_ATTENTION_H_
#define MS_QUANT_SPARSE_ATTENTION_H_

#include <stdint.h>

#include "kernels.h"

namespace msq {

constexpr int64_t kSliceQueries = 128;   // of a slice at most
constexpr int64_t kPieceKeys = 128;      // that are attended to at a time
constexpr int64_t kMostHeadSize = 1024;  // so that a sum of products of bytes is exact in float32
constexpr int64_t kMostTokens = int64_t{1} << 24;  // so that a distance is exact in float32

struct KeyRange {
  int64_t begin, end;
};

// The token at each place of a head; null where they are as they come.
inline const int64_t* order_of(const MsqBlockAttention& c, int64_t head) {
  return c.order && c.order_heads > 1 ? c.order + head * c.keys : c.order;
}

// Queries of one head that keep the same keys, but for the edges of a band.
struct AttentionSlice {
  int64_t batch, head;
  int64_t begin, end;
  int64_t band;            // keys farther than this from a query are hidden from it; -1 if none is
  const KeyRange* ranges;  // of keys, ascending and apart
  int64_t count;
};

}  // namespace msq

#endif  // MS_QUANT_SPARSE_ATTENTION_H_
