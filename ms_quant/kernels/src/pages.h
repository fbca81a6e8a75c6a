// Memory of which is known whether it was written to, whoever wrote.
//
// The system is asked to refuse writes to the pages. The first one faults, the handler of the fault
// notes it and lets that write and all others pass, and whoever looks for changes asks for the next
// round. Reading costs nothing, and so does looking: it is one load.

#ifndef MS_QUANT_PAGES_H_
#define MS_QUANT_PAGES_H_

#include <stdint.h>

#include <atomic>

struct MsqPages {
  std::atomic<uint8_t*> start;  // null while nobody uses this record
  std::atomic<int64_t> bytes;   // a multiple of the page's
  std::atomic<int32_t> changed;
  std::atomic_flag busy;  // while `changed` and what the system was told differ
  MsqPages* next;
};

namespace msq {

// Writes from now on are noticed. Where they cannot be, the pages stay changed for good.
void watch(MsqPages& pages);

inline bool has_changed(const MsqPages& pages) {
  return pages.changed.load(std::memory_order_acquire);
}

}  // namespace msq

#endif  // MS_QUANT_PAGES_H_
