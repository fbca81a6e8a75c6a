#include "avx512.h"
#include "block_impl.h"

namespace msq {

const Kernels* kernels_avx512_vnni() { return all_kernels<Avx512Vnni>(); }

}  // namespace msq
