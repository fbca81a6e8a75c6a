#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace msq {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread waits for the next job before it sleeps: waking it takes some tens of
// microseconds, and decoding calls again by then.
constexpr std::chrono::microseconds kPatience(200);
constexpr int kLooks = 32;  // between two looks at the clock

constexpr uint64_t kMost = 1 << 16;  // threads

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// A job is open for so many threads. Each that comes takes a place; those that have not come when
// all pieces are taken are not waited for.
class Pool {
 public:
  void run(int64_t count, int helpers, Piece piece, void* job) {
    start(helpers);
    piece_ = piece;
    job_ = job;
    count_ = count;
    runs_ = 2 * (helpers + 1);
    next_.store(0, std::memory_order_relaxed);
    state_.store(static_cast<uint64_t>(helpers) * kMost);
    if (sleeping_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    work();
    state_.fetch_and(kMost - 1);
    while (state_.load(std::memory_order_acquire) != 0) relax();
  }

  std::mutex busy;

 private:
  void start(int helpers) {
    for (; started_ < helpers; ++started_) std::thread([this] { serve(); }).detach();
  }

  void serve() {
    for (;;) {
      wait();
      uint64_t seen = state_.load();
      while (seen >= kMost && !state_.compare_exchange_weak(seen, seen - kMost + 1)) {
      }
      if (seen < kMost) continue;
      work();
      state_.fetch_sub(1, std::memory_order_release);
    }
  }

  bool is_open() const { return state_.load() >= kMost; }

  void wait() {
    const auto end = Clock::now() + kPatience;
    do {
      for (int look = 0; look < kLooks; ++look, relax())
        if (is_open()) return;
    } while (Clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [this] { return is_open(); });
    sleeping_.fetch_sub(1);
  }

  // Takes pieces in runs, as the next of a run often lies behind it in memory: long ones first, as
  // long as there is much left for all.
  void work() {
    int64_t i = next_.load();
    while (i < count_) {
      const int64_t run = (count_ - i) / runs_ + 1;
      if (!next_.compare_exchange_weak(i, i + run)) continue;
      for (const int64_t end = i + run; i < end; ++i) piece_(job_, i);
      i = next_.load();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  alignas(64) std::atomic<uint64_t> state_{0};  // places left, times kMost, plus threads at work
  std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  Piece piece_ = nullptr;
  void* job_ = nullptr;
  int64_t count_ = 0;
  int64_t runs_ = 1;  // of which a thread takes one of what is left
  int started_ = 0;
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
