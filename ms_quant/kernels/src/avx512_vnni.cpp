#include "attention_impl.h"
#include "avx512.h"

namespace msq {

const Kernels* kernels_avx512_vnni() { return all_kernels<Avx512Vnni>(); }

}  // namespace msq
