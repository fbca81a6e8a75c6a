#include "kernels.h"

#include <math.h>
#include <string.h>

#include <atomic>

#include "amx_product.h"
#include "blob.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace msq {
namespace {

std::atomic<int32_t> fastest{MSQ_ISAS - 1};

#if defined(__x86_64__)
// The registers that the system saves: bits 1 and 2 are those of AVX, 5 to 7 those of AVX-512, 17
// and 18 those of AMX.
uint64_t saved_registers() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool has_vnni(uint32_t ecx7) { return ecx7 >> 11 & 1; }

// Tiles for bytes and bfloat16. Linux saves them for a process and its children that asked for it.
bool has_amx(uint32_t edx7) {
  if (!(edx7 >> 22 & 1) || !(edx7 >> 24 & 1) || !(edx7 >> 25 & 1)) return false;
  if ((saved_registers() & 0x60000) != 0x60000) return false;
#if defined(__linux__)
  constexpr long kAskForRegisters = 0x1023, kTiles = 18;
  return syscall(SYS_arch_prctl, kAskForRegisters, kTiles) == 0;
#else
  return false;
#endif
}

bool has(int isa) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const bool fma = c >> 12 & 1, saves = c >> 27 & 1;
  if (!fma || !saves || (saved_registers() & 6) != 6) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool avx2 = b >> 5 & 1;
  if (isa == MSQ_AVX2) return avx2;
  if (isa == MSQ_AVX512_VNNI || isa == MSQ_AMX) {
    const bool foundation = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    const bool vectors = foundation && has_vnni(c) && (saved_registers() & 0xe6) == 0xe6;
    return vectors && (isa == MSQ_AVX512_VNNI || has_amx(d));
  }
  if (isa == MSQ_AVX_VNNI) {
    if (!avx2 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    return a >> 4 & 1;
  }
  return false;
}
#elif defined(__aarch64__)
bool has(int isa) {
  const bool dot = getauxval(AT_HWCAP) >> 20 & 1, i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
  return dot && (isa == MSQ_NEON_DOT || (isa == MSQ_NEON_I8MM && i8mm));
}
#else
bool has(int) { return false; }
#endif

const Kernels* look_up(int isa) {
  if (isa == MSQ_SCALAR) return kernels_scalar();
  if (!has(isa)) return nullptr;
#ifdef MSQ_WITH_AVX2
  if (isa == MSQ_AVX2) return kernels_avx2();
#endif
#ifdef MSQ_WITH_AVX_VNNI
  if (isa == MSQ_AVX_VNNI) return kernels_avx_vnni();
#endif
#ifdef MSQ_WITH_AVX512_VNNI
  if (isa == MSQ_AVX512_VNNI) return kernels_avx512_vnni();
#endif
#if defined(MSQ_WITH_AMX) && defined(MSQ_WITH_AVX512_VNNI)
  if (isa == MSQ_AMX) return kernels_amx();
#endif
#ifdef MSQ_WITH_NEON_DOT
  if (isa == MSQ_NEON_DOT) return kernels_neon_dot();
#endif
#ifdef MSQ_WITH_NEON_I8MM
  if (isa == MSQ_NEON_I8MM) return kernels_neon_i8mm();
#endif
  return nullptr;
}

#ifdef MSQ_WITH_AMX_PRODUCT
bool has_product() {
  uint32_t a, b, c, d;
  static const bool rounds = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  return rounds && kernels_of(MSQ_AMX);  // AVX512_BF16
}
#endif

bool sizes_fit(int64_t outputs, int64_t inputs) {
  return outputs > 0 && inputs > 0 && outputs < kLimit && inputs < kLimit;
}

int64_t words_bytes(const Kernels& kernels, int64_t outputs, int64_t inputs, int bits) {
  const int64_t panels = (outputs + kernels.columns - 1) / kernels.columns;
  return panels * kernels.columns * steps_of(inputs, bits) * 4;
}

// Arrays of params one after another, each of whole blocks of kPad.
class Writer {
 public:
  explicit Writer(uint8_t* start) : start_(start) {}

  int64_t array(int64_t elements) {
    const int64_t at = bytes_;
    bytes_ += (elements + kPad - 1) / kPad * kPad * 4;
    return at;
  }

  // `count` rows of `length`, each padded to `padded` with `filler`; 0 if there is nothing.
  template <class T, class Value>
  int64_t fill(const T* from, int64_t padded, int64_t length, int64_t count, float filler,
               Value value) {
    if (!from) return 0;
    const int64_t at = array(padded * count);
    if (!start_) return at;
    float* out = reinterpret_cast<float*>(start_ + at);
    const int64_t room = (bytes_ - at) / 4;
    for (int64_t i = 0; i < room; ++i) out[i] = filler;
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < length; ++i) out[row * padded + i] = value(row, i);
    return at;
  }

  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* start_;
  int64_t bytes_ = sizeof(Params);
};

bool valid(const MsqLinear& l) {
  if (!sizes_fit(l.outputs, l.inputs) || l.group < 1 || l.inputs % l.group) return false;
  if (l.group != l.inputs && l.group % 8) return false;
  if (l.input < MSQ_FLOAT || l.input > MSQ_STATIC || !l.scale) return false;
  const bool divides = l.input_scale, multiplies = l.input_factor;
  if (l.input == MSQ_STATIC && divides == multiplies) return false;
  if (l.input != MSQ_FLOAT && (l.smallest < -128 || l.largest > 127 || l.smallest >= l.largest))
    return false;
  return l.input == MSQ_FLOAT || !l.zero_point;
}

Params lay_out(const MsqLinear& l, uint8_t* start) {
  Params p = {};
  p.magic = kParams;
  p.input = l.input;
  p.smallest = l.smallest;
  p.largest = l.largest;
  p.clip = l.clip;
  p.offset = l.offset;
  p.outputs = l.outputs;
  p.inputs = l.inputs;
  p.group = l.group;
  Writer writer(start);
  const int64_t groups = p.groups(), padded = p.padded(), n = l.inputs;
  const auto input = [&](const float* from) {
    return [from](int64_t, int64_t i) { return from[i]; };
  };
  p.mul = writer.fill(l.mul, n, n, 1, 1.0f, input(l.mul));
  p.input_scale = writer.fill(l.input_scale, n, n, 1, 1.0f, input(l.input_scale));
  p.input_inverse = l.input_factor
                        ? writer.fill(l.input_factor, n, n, 1, 1.0f, input(l.input_factor))
                        : writer.fill(l.input_scale, n, n, 1, 1.0f,
                                      [&](int64_t, int64_t i) { return 1.0f / l.input_scale[i]; });
  p.scale = writer.fill(l.scale, padded, l.outputs, groups, 0.0f,
                        [&](int64_t g, int64_t i) { return l.scale[i * groups + g]; });
  p.zero_scale = writer.fill(
      l.zero_point, padded, l.outputs, groups, 0.0f,
      [&](int64_t g, int64_t i) { return static_cast<float>(l.zero_point[i * groups + g]); });
  p.row_scale = writer.fill(l.row_scale, padded, l.outputs, 1, 0.0f, input(l.row_scale));
  p.int_bias = writer.fill(l.int_bias, padded, l.outputs, 1, 0.0f, [&](int64_t, int64_t i) {
    float bits;
    memcpy(&bits, l.int_bias + i, 4);
    return bits;
  });
  p.bias = writer.fill(l.bias, padded, l.outputs, 1, 0.0f, input(l.bias));
  p.bytes = writer.bytes();
  return p;
}

}  // namespace

const Kernels* kernels_of(int isa) {
  static const struct Found {
    const Kernels* of[MSQ_ISAS];
    Found() {
      for (int i = 0; i < MSQ_ISAS; ++i) of[i] = look_up(i);
    }
  } found;
  if (isa == MSQ_BEST) isa = msq_best_isa();
  return isa >= 0 && isa <= fastest.load() ? found.of[isa] : nullptr;
}

}  // namespace msq

using namespace msq;

int32_t msq_abi_version(void) { return 10; }

int32_t msq_has_isa(int32_t isa) { return isa >= 0 && isa < MSQ_ISAS && kernels_of(isa); }

void msq_limit_isa(int32_t isa) {
  if (isa >= 0 && isa < MSQ_ISAS) fastest.store(isa);
}

int32_t msq_best_isa(void) {
  for (int32_t isa = MSQ_ISAS - 1; isa > 0; --isa)
    if (msq_has_isa(isa)) return isa;
  return MSQ_SCALAR;
}

int64_t msq_weights_bytes(int32_t isa, int64_t outputs, int64_t inputs, int32_t bits) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || !sizes_fit(outputs, inputs) || (bits != 4 && bits != 8)) return -1;
  return static_cast<int64_t>(sizeof(Weights)) + words_bytes(*kernels, outputs, inputs, bits);
}

int64_t msq_params_bytes(const MsqLinear* linear) {
  return valid(*linear) ? lay_out(*linear, nullptr).bytes : -1;
}

int32_t msq_pack_weights(int32_t isa, const int8_t* codes, int64_t outputs, int64_t inputs,
                         int32_t bits, uint8_t* weights) {
  const int64_t bytes = msq_weights_bytes(isa, outputs, inputs, bits);
  if (bytes < 0) return MSQ_BAD_ARGUMENT;
  const int32_t chosen = isa == MSQ_BEST ? msq_best_isa() : isa;
  const Kernels& kernels = *kernels_of(chosen);
  Weights header = {};
  header.magic = kWeights;
  header.isa = chosen;
  header.bits = bits;
  header.outputs = outputs;
  header.inputs = inputs;
  memcpy(weights, &header, sizeof header);
  uint8_t* words = weights + sizeof header;
  const int64_t steps = steps_of(inputs, bits), columns = kernels.columns;
  memset(words, 0, static_cast<size_t>(bytes - static_cast<int64_t>(sizeof header)));
  for (int64_t row = 0; row < outputs; ++row) {
    uint8_t* panel = words + row / columns * steps * columns * 4 + row % columns * 4;
    const int8_t* from = codes + row * inputs;
    for (int64_t k = 0; k < inputs; ++k) {
      if (bits == 8) {
        panel[k / 4 * columns * 4 + k % 4] = static_cast<uint8_t>(from[k] + kernels.bias8);
      } else {
        const uint8_t half = static_cast<uint8_t>((from[k] + 8) & 15);
        panel[k / 8 * columns * 4 + k % 4] |= static_cast<uint8_t>(k % 8 < 4 ? half : half << 4);
      }
    }
  }
  return MSQ_OK;
}

int32_t msq_pack_params(const MsqLinear* linear, uint8_t* params) {
  if (!valid(*linear)) return MSQ_BAD_ARGUMENT;
  const Params made = lay_out(*linear, params);
  memcpy(params, &made, sizeof made);
  return MSQ_OK;
}

int32_t msq_linear(const uint8_t* weights, int64_t weights_bytes, const uint8_t* params,
                   int64_t params_bytes, const float* x, int64_t rows, float* y, int32_t threads) {
  if (weights_bytes < static_cast<int64_t>(sizeof(Weights)) ||
      params_bytes < static_cast<int64_t>(sizeof(Params)))
    return MSQ_BAD_BLOB;
  const Weights& w = *reinterpret_cast<const Weights*>(weights);
  const Params& p = *reinterpret_cast<const Params*>(params);
  if (w.magic != kWeights || p.magic != kParams || p.bytes > params_bytes) return MSQ_BAD_BLOB;
  const Kernels* kernels = kernels_of(w.isa);
  if (!kernels) return MSQ_NO_ISA;
  if (w.outputs != p.outputs || w.inputs != p.inputs || (w.bits != 4 && w.bits != 8) ||
      !sizes_fit(w.outputs, w.inputs) || p.group < 1 || p.inputs % p.group)
    return MSQ_BAD_BLOB;
  const int64_t needed = words_bytes(*kernels, w.outputs, w.inputs, w.bits);
  if (weights_bytes - static_cast<int64_t>(sizeof(Weights)) < needed) return MSQ_BAD_BLOB;
  if (rows < 0 || threads < 1) return MSQ_BAD_ARGUMENT;
  bool out_of_memory = false;
  if (rows) kernels->linear(w, p, x, rows, y, threads, &out_of_memory);
  return out_of_memory ? MSQ_NO_MEMORY : MSQ_OK;
}

int32_t msq_quantize_rows(int32_t isa, const float* x, int64_t rows, int64_t columns,
                          int32_t smallest, int32_t largest, float clip, int32_t cleared,
                          int8_t* codes, float* scales, int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 0 || columns < 0 || threads < 1) return MSQ_BAD_ARGUMENT;
  if (cleared < 0 || cleared >= 23) return MSQ_BAD_ARGUMENT;
  kernels->quantize_rows(x, rows, columns, static_cast<float>(smallest),
                         static_cast<float>(largest), clip, cleared, codes, scales, threads);
  return MSQ_OK;
}

int32_t msq_quantize_stored(int32_t isa, const void* stored, const float* block_scales,
                            int64_t width, int64_t rows, int64_t columns, int32_t smallest,
                            int32_t largest, int32_t cleared, int8_t* codes, float* scales,
                            int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 0 || columns < 0 || threads < 1) return MSQ_BAD_ARGUMENT;
  if (cleared < 0 || cleared >= 23 || width < 1) return MSQ_BAD_ARGUMENT;
  StoredRows all = {stored,
                    block_scales,
                    width,
                    rows,
                    columns,
                    static_cast<float>(smallest),
                    static_cast<float>(largest),
                    cleared,
                    codes,
                    scales};
  kernels->quantize_stored(all, threads);
  for (int64_t row = 0; row < rows; ++row)
    if (!isfinite(scales[row])) return MSQ_NOT_FINITE;
  return MSQ_OK;
}

int32_t msq_rms_norm(int32_t isa, const float* x, const float* weight, int64_t rows, int64_t size,
                     float eps, float* y, int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 0 || size < 1 || threads < 1) return MSQ_BAD_ARGUMENT;
  kernels->rms_norm(x, weight, rows, size, eps, y, threads);
  return MSQ_OK;
}

int32_t msq_swiglu(int32_t isa, const float* gate, const float* up, int64_t count, float* y,
                   int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || count < 0 || threads < 1) return MSQ_BAD_ARGUMENT;
  kernels->swiglu(gate, up, count, y, threads);
  return MSQ_OK;
}

int32_t msq_rope(int32_t isa, const float* x, const float* cos, const float* sin, int64_t batch,
                 int64_t length, int64_t heads, int64_t size, float* y, int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || batch < 0 || length < 0 || heads < 0 || size < 0 || size % 2 || threads < 1)
    return MSQ_BAD_ARGUMENT;
  kernels->rope(x, cos, sin, batch, length, heads, size, y, threads);
  return MSQ_OK;
}

int32_t msq_softmax(int32_t isa, float* x, const float* mask, int64_t rows, int64_t columns,
                    int64_t length, int64_t rows_of_mask, float scale, int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 0 || columns < 1 || length < 1 || rows_of_mask < length || threads < 1)
    return MSQ_BAD_ARGUMENT;
  kernels->softmax(x, mask, rows, columns, length, rows_of_mask, scale, threads);
  return MSQ_OK;
}

int32_t msq_attention(int32_t isa, const float* q, const float* k, const float* v,
                      const float* mask, int64_t batch, int64_t heads, int64_t kv_heads,
                      int64_t length, int64_t total, int64_t size, int64_t masks, float scale,
                      float* y, int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || batch < 0 || heads < 1 || kv_heads < 1 || heads % kv_heads || length < 0 ||
      total < 1 || size < 1 || (masks != 1 && masks != batch) || threads < 1)
    return MSQ_BAD_ARGUMENT;
  if (!batch || !length) return MSQ_OK;
  const Attention attention = {q,      k,     v,    mask,  batch, heads, kv_heads,
                               length, total, size, masks, scale, y};
  return kernels->attention(attention, threads) ? MSQ_OK : MSQ_NO_MEMORY;
}

int32_t msq_row_products(int32_t isa, const void* w, int32_t bfloat16, int64_t outputs,
                         int64_t inputs, const float* bias, const float* x, int64_t rows, float* y,
                         int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 0 || !sizes_fit(outputs, inputs) || threads < 1) return MSQ_BAD_ARGUMENT;
  RowProducts products = {w, bfloat16 != 0, outputs, inputs, bias, x, rows, y};
  kernels->row_products(products, threads);
  return MSQ_OK;
}

int32_t msq_step_attention(int32_t isa, MsqStepAttention* step, int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || step->sequences < 0 || step->heads < 1 || step->kv_heads < 1 ||
      step->heads % step->kv_heads || step->size < 1 || step->value_size < 1 || threads < 1)
    return MSQ_BAD_ARGUMENT;
  for (int64_t i = 0; i < step->sequences; ++i)
    if (step->lengths[i] < 1) return MSQ_BAD_ARGUMENT;
  step->failed = 0;
  kernels->step_attention(*step, threads);
  return step->failed ? MSQ_NO_MEMORY : MSQ_OK;
}

int64_t msq_rows_alike(const uint8_t* weights, int64_t weights_bytes) {
  const Weights& w = *reinterpret_cast<const Weights*>(weights);
  if (weights_bytes < static_cast<int64_t>(sizeof w) || w.magic != kWeights) return -1;
  const Kernels* kernels = kernels_of(w.isa);
  return kernels ? kernels->rows_alike : -1;
}

int32_t msq_product(const float* x, int64_t rows, const float* w, int64_t outputs, int64_t inputs,
                    const float* bias, float* y, int32_t threads) {
  if (rows < 1 || !sizes_fit(outputs, inputs) || threads < 1) return MSQ_BAD_ARGUMENT;
#ifdef MSQ_WITH_AMX_PRODUCT
  if (has_product()) return amx_product(x, rows, w, outputs, inputs, bias, y, threads);
#endif
  return MSQ_NO_ISA;
}

int32_t msq_syrk(const float* x, int64_t rows, int64_t columns, float* products, int32_t threads) {
  if (rows < 1 || !sizes_fit(columns, columns) || threads < 1) return MSQ_BAD_ARGUMENT;
#ifdef MSQ_WITH_AMX_PRODUCT
  if (has_product()) return amx_syrk(x, rows, columns, products, threads);
#endif
  return MSQ_NO_ISA;
}

int32_t msq_column_stats(int32_t isa, const float* x, int64_t rows, int64_t columns, float* low,
                         float* high, double* squares, double* sizes, int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 0 || columns < 0 || threads < 1) return MSQ_BAD_ARGUMENT;
  ColumnStats stats = {x, rows, columns, low, high, squares, sizes, false};
  kernels->column_stats(stats, threads);
  return stats.not_finite ? MSQ_NOT_FINITE : MSQ_OK;
}
