// A few threads that share out the pieces of one job at a time.

#ifndef MS_QUANT_POOL_H_
#define MS_QUANT_POOL_H_

#include <stdint.h>

namespace msq {

typedef void (*Piece)(void* job, int64_t index);

// Calls piece(job, i) for every i below `count`, on at most `threads` threads, the caller's among
// them. While another thread's job is running it all happens on the caller's.
void share_out(int64_t count, int threads, Piece piece, void* job);

constexpr int kSlots = 7;

// A buffer of this thread's own of at least that many bytes, aligned to 64; null without memory.
// What was there before is gone.
void* scratch(int slot, int64_t bytes);

}  // namespace msq

#endif  // MS_QUANT_POOL_H_
