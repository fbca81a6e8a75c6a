// The plan of block-sparse attention: which keys each slice of queries keeps, and who does it.

#include "sparse_attention.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "blob.h"
#include "pool.h"

namespace msq {
namespace {

using Ranges = std::vector<KeyRange>;

// Ascending stretches; those that touch are one.
void append(Ranges& ranges, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (!ranges.empty() && ranges.back().end == begin)
    ranges.back().end = end;
  else
    ranges.push_back({begin, end});
}

class Plan {
 public:
  explicit Plan(const MsqBlockAttention& c) : c_(c) {
    const int64_t block = c.blocks ? c.block_queries : c.queries;
    for (int64_t begin = 0; begin < c.queries;) {
      int64_t end = std::min(begin + kSliceQueries, c.queries);
      end = std::min(end, (begin / block + 1) * block);
      if ((c.band || c.leading) && begin < c.first) end = std::min(end, c.first);
      slices_.push_back({begin, end});
      begin = end;
    }
  }

  int64_t items() const { return c_.batch * c_.heads * static_cast<int64_t>(slices_.size()); }

  AttentionSlice slice(int64_t item, Ranges& ranges) const {
    const int64_t count = static_cast<int64_t>(slices_.size()), head = item / count;
    const KeyRange queries = slices_[static_cast<size_t>(item % count)];
    AttentionSlice s = {
        head / c_.heads, head % c_.heads, queries.begin, queries.end, -1, nullptr, 0};
    if (c_.band && queries.begin >= c_.first) s.band = std::min(c_.band[s.head], kMostTokens);
    int64_t keys = c_.keys;
    if (c_.leading && queries.begin >= c_.first && c_.leading[s.head] >= 0)
      keys = std::min(keys, c_.leading[s.head]);
    ranges.clear();
    if (s.band < 0) {
      in_blocks(s, 0, keys, ranges);
    } else {
      const int64_t first = std::min(c_.first, keys);
      in_blocks(s, 0, first, ranges);
      in_blocks(s, std::max(first, s.begin - s.band), std::min(keys, s.end + s.band), ranges);
    }
    s.ranges = ranges.data();
    s.count = static_cast<int64_t>(ranges.size());
    return s;
  }

 private:
  void in_blocks(const AttentionSlice& s, int64_t begin, int64_t end, Ranges& ranges) const {
    if (begin >= end) return;
    if (!c_.blocks) return kept(s, begin, end, ranges);
    const int64_t across = (c_.keys + c_.block_keys - 1) / c_.block_keys;
    const int64_t down = (c_.queries + c_.block_queries - 1) / c_.block_queries;
    const int64_t batch = c_.block_batches > 1 ? s.batch : 0;
    const int64_t head = c_.block_heads > 1 ? s.head : 0;
    const uint8_t* row =
        c_.blocks + ((batch * c_.block_heads + head) * down + s.begin / c_.block_queries) * across;
    for (int64_t block = begin / c_.block_keys; block * c_.block_keys < end; ++block)
      if (row[block])
        kept(s, std::max(begin, block * c_.block_keys), std::min(end, (block + 1) * c_.block_keys),
             ranges);
  }

  void kept(const AttentionSlice& s, int64_t begin, int64_t end, Ranges& ranges) const {
    if (!c_.kept) return append(ranges, begin, end);
    const uint8_t* row = c_.kept + s.batch * c_.keys;
    if (const int64_t* tokens = order_of(c_, s.head)) {
      for (int64_t key = begin; key < end; ++key)
        if (row[tokens[key]]) append(ranges, key, key + 1);
      return;
    }
    const auto next = [&](int64_t from, int value) {
      const void* at = memchr(row + from, value, static_cast<size_t>(end - from));
      return at ? static_cast<const uint8_t*>(at) - row : end;
    };
    while (begin < end) {
      begin = next(begin, 1);
      const int64_t stop = next(begin, 0);
      append(ranges, begin, stop);
      begin = stop;
    }
  }

  const MsqBlockAttention& c_;
  Ranges slices_;
};

int64_t cost(const AttentionSlice& s) {
  int64_t keys = 0;
  for (int64_t i = 0; i < s.count; ++i) keys += s.ranges[i].end - s.ranges[i].begin;
  return (s.end - s.begin) * (keys + 16);
}

// Threads take slices one by one, those with most keys first, so that none is left with much when
// the others are done. Slices of one head that cost the same follow each other.
struct Job {
  const MsqBlockAttention& c;
  const Kernels& kernels;
  const Plan& plan;
  std::vector<int64_t> order;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  static void work(void* job, int64_t) {
    Job& j = *static_cast<Job*>(job);
    Ranges ranges;
    const int64_t count = j.plan.items();
    for (int64_t i; (i = j.next.fetch_add(1)) < count;) {
      const int64_t item = j.order.empty() ? i : j.order[static_cast<size_t>(i)];
      if (!j.kernels.attend_slice(j.c, j.plan.slice(item, ranges))) j.failed = true;
    }
  }
};

std::vector<int64_t> dearest_first(const Plan& plan) {
  std::vector<int64_t> order(static_cast<size_t>(plan.items())), costs;
  costs.reserve(order.size());
  Ranges ranges;
  for (int64_t item = 0; item < plan.items(); ++item)
    costs.push_back(cost(plan.slice(item, ranges)));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return costs[static_cast<size_t>(a)] > costs[static_cast<size_t>(b)];
  });
  return order;
}

bool valid(const MsqOperand& o) {
  if (!o.data || o.kind < MSQ_FLOATS || o.kind > MSQ_E4M3) return false;
  return o.kind == MSQ_FLOATS || (o.scales && o.rows > 0 && o.columns > 0);
}

// The tokens of each head, each once.
bool valid_order(const MsqBlockAttention& c) {
  if (!c.order) return true;
  if (c.queries != c.keys || (c.order_heads != 1 && c.order_heads != c.heads)) return false;
  std::vector<bool> seen(static_cast<size_t>(c.keys));
  for (int64_t head = 0; head < c.order_heads; ++head) {
    std::fill(seen.begin(), seen.end(), false);
    for (int64_t place = 0; place < c.keys; ++place) {
      const int64_t token = c.order[head * c.keys + place];
      if (token < 0 || token >= c.keys || seen[static_cast<size_t>(token)]) return false;
      seen[static_cast<size_t>(token)] = true;
    }
  }
  return true;
}

bool valid(const MsqBlockAttention& c) {
  if (!valid(c.q) || !valid(c.k) || !valid(c.v) || !c.y) return false;
  if (c.batch < 0 || c.heads < 0 || c.queries < 0 || c.keys < 0 || c.queries > kMostTokens ||
      c.keys > kMostTokens || c.first < 0 || !valid_order(c))
    return false;
  if (c.size < 1 || c.size > kMostHeadSize || c.value_size < 1 || c.value_size > kMostHeadSize)
    return false;
  if (!c.blocks) return true;
  return c.block_queries > 0 && c.block_keys > 0 &&
         (c.block_batches == 1 || c.block_batches == c.batch) &&
         (c.block_heads == 1 || c.block_heads == c.heads);
}

}  // namespace

}  // namespace msq

using namespace msq;

int32_t msq_block_attention(int32_t isa, const MsqBlockAttention* attention, int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || !valid(*attention) || threads < 1) return MSQ_BAD_ARGUMENT;
  const Plan plan(*attention);
  if (!plan.items()) return MSQ_OK;
  Job job = {*attention, *kernels, plan, {}};
  if (threads > 1) job.order = dearest_first(plan);
  share_out(threads, threads, Job::work, &job);
  return job.failed ? MSQ_NO_MEMORY : MSQ_OK;
}
