// What the two blobs of a linear hold; see kernels.h.

#ifndef MS_QUANT_BLOB_H_
#define MS_QUANT_BLOB_H_

#include <stdint.h>

#include "kernels.h"

namespace msq {

constexpr uint32_t kWeights = 0x5751534d, kParams = 0x5051534d;  // "MSQW", "MSQP"
constexpr int64_t kAlign = 64;
constexpr int64_t kPad = 64;  // columns of params are padded to a multiple of every panel
constexpr int64_t kLimit = int64_t{1} << 31;  // of outputs, of inputs

// After it: panels of `Simd::kColumns` outputs. A panel is steps of 4 inputs (8 bits) or 8 (4
// bits), a step one 32-bit word for each output: the codes of 4 inputs, one a byte, the first in
// the lowest; or of 8, input i in the low half of byte i, input 4 + i in its high half.
struct Weights {
  uint32_t magic;
  int32_t isa, bits, reserved;
  int64_t outputs, inputs;
  int64_t pad[4];

  const uint8_t* words() const { return reinterpret_cast<const uint8_t*>(this + 1); }
};
static_assert(sizeof(Weights) == kAlign, "header");

// After it: arrays at these offsets from the header, 0 for none.
struct Params {
  uint32_t magic;
  int32_t input, smallest, largest;
  float clip, offset;
  int64_t outputs, inputs, group;
  int64_t mul, input_scale, input_inverse;               // float (inputs); scale 0: multiplied
  int64_t scale, zero_scale, row_scale, int_bias, bias;  // (groups, padded), (padded)
  int64_t bytes, pad;

  int64_t groups() const { return group ? inputs / group : 0; }
  int64_t padded() const { return (outputs + kPad - 1) / kPad * kPad; }
  const float* floats(int64_t at) const {
    return at ? reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(this) + at)
              : nullptr;
  }
  const int32_t* ints(int64_t at) const {
    return at ? reinterpret_cast<const int32_t*>(reinterpret_cast<const uint8_t*>(this) + at)
              : nullptr;
  }
};
static_assert(sizeof(Params) == 2 * kAlign, "header");

// Statistics of columns, and what is added to them.
struct ColumnStats {
  const float* x;
  int64_t rows, columns;
  float *low, *high;
  double *squares, *sizes;
  bool not_finite;
};

// What msq_quantize_stored is asked.
struct StoredRows {
  const void* stored;
  const float* block_scales;  // of E4M3; null for bfloat16
  int64_t width, rows, columns;
  float smallest, largest;
  int32_t cleared;
  int8_t* codes;
  float* scales;
};

// What msq_attention is asked.
struct Attention {
  const float *q, *k, *v, *mask;
  int64_t batch, heads, kv_heads, length, total, size, masks;
  float scale;
  float* y;
};

// What msq_row_products is asked.
struct RowProducts {
  const void* w;
  bool bfloat16;
  int64_t outputs, inputs;
  const float *bias, *x;
  int64_t rows;
  float* y;
};

struct AttentionSlice;

// What an instruction set provides.
struct Kernels {
  int64_t columns;  // of a panel
  int32_t bias8;    // added to codes of 8 bits in a panel, mod 256; those of 4 bits have 8 added
  void (*linear)(const Weights&, const Params&, const float* x, int64_t rows, float* y, int threads,
                 bool* out_of_memory);
  void (*quantize_rows)(const float* x, int64_t rows, int64_t columns, float smallest,
                        float largest, float clip, int32_t cleared, int8_t* codes, float* scales,
                        int threads);
  void (*quantize_stored)(StoredRows&, int threads);
  void (*rms_norm)(const float* x, const float* weight, int64_t rows, int64_t size, float eps,
                   float* y, int threads);
  void (*swiglu)(const float* gate, const float* up, int64_t count, float* y, int threads);
  void (*rope)(const float* x, const float* cos, const float* sin, int64_t batch, int64_t length,
               int64_t heads, int64_t size, float* y, int threads);
  void (*softmax)(float* x, const float* mask, int64_t rows, int64_t columns, int64_t length,
                  int64_t rows_of_mask, float scale, int threads);
  bool (*attention)(const Attention&, int threads);  // false without memory
  void (*column_stats)(ColumnStats&, int threads);
  void (*row_products)(RowProducts&, int threads);
  void (*step_attention)(MsqStepAttention&, int threads);
  int64_t rows_alike;  // of floats that a linear takes at a time without one changing another
  bool (*attend_slice)(const MsqBlockAttention&, const AttentionSlice&);  // false without memory
};

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx_vnni();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_neon_dot();
const Kernels* kernels_neon_i8mm();
const Kernels* kernels_amx();
const Kernels* kernels_of(int isa);  // null if this machine has it not

inline int64_t steps_of(int64_t inputs, int bits) { return (inputs + 32 / bits - 1) / (32 / bits); }

}  // namespace msq

#endif  // MS_QUANT_BLOB_H_
