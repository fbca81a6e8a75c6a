#include "attention_impl.h"
#include "neon.h"

namespace msq {

const Kernels* kernels_neon_dot() { return all_kernels<NeonDot>(); }

}  // namespace msq
