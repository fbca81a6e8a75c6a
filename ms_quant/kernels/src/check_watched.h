#ifndef MS_QUANT_CHECK_WATCHED_H_
#define MS_QUANT_CHECK_WATCHED_H_

namespace check {

// Pages tell whether they were written to, whoever writes and from however many threads.
void check_pages();

// A fault outside of watched pages still reaches the handler that was there before.
void check_other_faults();

// A linear in watched pages computes with what its arrays hold at each call.
void check_watched(int isa);

}  // namespace check

#endif  // MS_QUANT_CHECK_WATCHED_H_
