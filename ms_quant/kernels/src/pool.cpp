#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace msq {
namespace {

constexpr int kSpins = 400;  // some tens of microseconds: decoding calls again by then

constexpr uint64_t kMost = 1 << 16;  // threads

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

class Pool {
 public:
  void run(int64_t count, int helpers, Piece piece, void* job) {
    start(helpers);
    piece_ = piece;
    job_ = job;
    count_ = count;
    next_.store(0);
    working_.store(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      state_.store((state_.load() / kMost + 1) * kMost + static_cast<uint64_t>(helpers));
    }
    wake_.notify_all();
    work();
    while (working_.load(std::memory_order_acquire) != 0) relax();
  }

  std::mutex busy;

 private:
  void start(int helpers) {
    while (started_ < static_cast<uint64_t>(helpers)) {
      const uint64_t index = started_++;
      std::thread([this, index, seen = state_.load()] { serve(index, seen); }).detach();
    }
  }

  // Whoever is wanted is waited for, so it misses no job; the others may miss some.
  void serve(uint64_t index, uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && state_.load() == seen; ++spin) relax();
      if (state_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return state_.load() != seen; });
      }
      seen = state_.load();
      if (index >= seen % kMost) continue;
      work();
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  void work() {
    for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) piece_(job_, i);
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};  // the number of the job, times kMost, plus its helpers
  std::atomic<int64_t> next_{0};
  std::atomic<int> working_{0};
  Piece piece_ = nullptr;
  void* job_ = nullptr;
  int64_t count_ = 0;
  uint64_t started_ = 0;
};

// Never freed: its threads may still wait when the process ends. A child of fork has none of the
// threads and perhaps locked mutexes, so it begins with another one.
std::atomic<Pool*> current{nullptr};

Pool* pool() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)once;
  Pool* found = current.load();
  if (found) return found;
  Pool* made = new Pool;
  if (current.compare_exchange_strong(found, made)) return made;
  delete made;
  return found;
}

struct Buffers {
  void* at[kSlots] = {};
  int64_t bytes[kSlots] = {};
  ~Buffers() {
    for (void* buffer : at) free(buffer);
  }
};

}  // namespace

void share_out(int64_t count, int threads, Piece piece, void* job) {
  int64_t helpers = (count < threads ? count : threads) - 1;
  helpers = helpers < static_cast<int64_t>(kMost) ? helpers : static_cast<int64_t>(kMost) - 1;
  if (helpers > 0) {
    Pool* shared = pool();
    std::unique_lock<std::mutex> lock(shared->busy, std::try_to_lock);
    if (lock.owns_lock()) return shared->run(count, static_cast<int>(helpers), piece, job);
  }
  for (int64_t i = 0; i < count; ++i) piece(job, i);
}

void* scratch(int slot, int64_t bytes) {
  static thread_local Buffers buffers;
  if (buffers.bytes[slot] < bytes) {
    free(buffers.at[slot]);
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    buffers.at[slot] = aligned_alloc(64, static_cast<size_t>(rounded));
    buffers.bytes[slot] = buffers.at[slot] ? rounded : 0;
  }
  return buffers.at[slot];
}

}  // namespace msq
