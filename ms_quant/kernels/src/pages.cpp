#include "pages.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>

#include "kernels.h"

namespace msq {
namespace {

// Records are used again and never freed: a fault may come in the middle of anything.
std::atomic<MsqPages*> first{nullptr};
std::mutex mutex;  // of the list, and of the handlers below

#if defined(__APPLE__)
constexpr int kSignals[] = {SIGSEGV, SIGBUS};
#else
constexpr int kSignals[] = {SIGSEGV};
#endif
constexpr int kCount = sizeof kSignals / sizeof *kSignals;
struct sigaction before[kCount];  // of faults that are not ours
std::atomic<bool> echoed{false};

// A fault may come while another thread is here, but never on the thread that is.
class Busy {
 public:
  explicit Busy(MsqPages& pages) : flag_(pages.busy) {
    while (flag_.test_and_set(std::memory_order_acquire)) {
    }
  }
  ~Busy() { flag_.clear(std::memory_order_release); }

 private:
  std::atomic_flag& flag_;
};

bool take(uint8_t* at) {
  for (MsqPages* pages = first.load(std::memory_order_acquire); pages; pages = pages->next) {
    uint8_t* start = pages->start.load(std::memory_order_acquire);
    const int64_t bytes = pages->bytes.load(std::memory_order_relaxed);
    if (!start || at < start || at >= start + bytes) continue;
    const Busy busy(*pages);
    pages->changed.store(1, std::memory_order_release);
    return mprotect(start, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE) == 0;
  }
  return false;
}

// A fault of somebody else's: to the handler before, once. It comes again if that did not end it,
// and then ends the process as it would have without any handler.
void pass_on(int index, int number, siginfo_t* info, void* context) {
  const struct sigaction other = before[index];
  struct sigaction none = {};
  none.sa_handler = SIG_DFL;
  before[index] = none;
  if (other.sa_flags & SA_SIGINFO) {
    other.sa_sigaction(number, info, context);
  } else if (other.sa_handler == SIG_DFL || other.sa_handler == SIG_IGN) {
    sigaction(number, &none, nullptr);
    if (info->si_code <= 0) raise(number);  // was sent, and would not come again
  } else {
    other.sa_handler(number);
  }
}

// Python's faulthandler, if it was put in place after this one, reports a fault of ours and then
// sends the signal itself. It would end the process; so once the fault is let come again.
bool is_echo(const siginfo_t* info) {
  return info->si_code <= 0 && info->si_pid == getpid() && !echoed.exchange(true);
}

void on_fault(int number, siginfo_t* info, void* context) {
  const int error = errno;
  const bool ours = info->si_code > 0 ? take(static_cast<uint8_t*>(info->si_addr)) : is_echo(info);
  for (int i = 0; i < kCount && !ours; ++i)
    if (kSignals[i] == number) pass_on(i, number, info, context);
  errno = error;
}

// Puts the handler in place, again if somebody put another one there.
bool handles() {
  for (int i = 0; i < kCount; ++i) {
    struct sigaction now;
    if (sigaction(kSignals[i], nullptr, &now)) return false;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault) continue;
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&ours.sa_mask);
    before[i] = now;
    if (sigaction(kSignals[i], &ours, nullptr)) return false;
  }
  return true;
}

}  // namespace

void watch(MsqPages& pages) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!handles()) return;
  echoed.store(false);
  const Busy busy(pages);
  pages.changed.store(0);
  const size_t bytes = static_cast<size_t>(pages.bytes.load());
  if (mprotect(pages.start.load(), bytes, PROT_READ)) pages.changed.store(1);
}

}  // namespace msq

using namespace msq;

MsqPages* msq_pages_new(int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  if (bytes < 1 || page < 1) return nullptr;
  bytes = (bytes + page - 1) / page * page;
  void* start = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  MsqPages* pages = first.load();
  while (pages && pages->start.load()) pages = pages->next;
  const bool is_new = !pages;
  if (is_new) pages = new MsqPages{{}, {}, {}, ATOMIC_FLAG_INIT, nullptr};
  pages->changed.store(1);
  pages->bytes.store(bytes);
  pages->start.store(static_cast<uint8_t*>(start));
  if (is_new) {
    pages->next = first.load();
    first.store(pages, std::memory_order_release);
  }
  return pages;
}

void msq_pages_free(MsqPages* pages) {
  const std::lock_guard<std::mutex> lock(mutex);
  uint8_t* start = pages->start.load();
  const size_t bytes = static_cast<size_t>(pages->bytes.load());
  pages->start.store(nullptr);
  munmap(start, bytes);
}

uint8_t* msq_pages_start(const MsqPages* pages) { return pages->start.load(); }

int32_t msq_pages_changed(const MsqPages* pages) { return has_changed(*pages); }

void msq_pages_watch(MsqPages* pages) { watch(*pages); }
