// Linears whose arrays lie in watched pages: what was packed of them is packed again after a write.

#include <math.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <mutex>

#include "kernels.h"
#include "pages.h"

namespace msq {
namespace {

std::mutex packing;
std::atomic<int32_t> operator_threads{1};

bool all_the_same(const int8_t* from, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (from[i] != from[0]) return false;
  return true;
}

bool all_are_int4(const int8_t* codes, int64_t count) {
  uint8_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= static_cast<uint8_t>(codes[i] + 8) & 0xf0;
  return !outside;
}

// The nearest bfloat16, of ties the even one; infinity stays.
float as_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The nearest float16, of ties the even one; too large ones become infinite.
float as_float16(float x) {
  const float magnitude = fabsf(x);
  if (magnitude < 0x1p-14f) return rintf(x * 0x1p24f) * 0x1p-24f;
  if (magnitude >= 65520.0f) return copysignf(INFINITY, x);
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000;
  memcpy(&x, &bits, sizeof x);
  return x;
}

float as_held(float x, int32_t type) {
  return type == MSQ_BFLOAT16 ? as_bfloat16(x) : type == MSQ_FLOAT16 ? as_float16(x) : x;
}

int32_t pack(const MsqWatchedLinear& cell) {
  const MsqLinear& any = cell.phases[0];
  for (int64_t i = 0; cell.divisor && i < any.inputs; ++i)
    cell.factor[i] = as_held(1.0f / as_held(cell.divisor[i], cell.held_in), cell.held_in);
  if (cell.bits == 4 && !all_are_int4(cell.codes, any.outputs * any.inputs)) return MSQ_NOT_INT4;
  if (cell.offset && !all_the_same(cell.offset, any.inputs)) return MSQ_OFFSETS_DIFFER;
  for (int i = 0; i < 2 && cell.params[i]; ++i) {
    MsqLinear linear = cell.phases[i];
    if (cell.offset) linear.offset = cell.offset[0];
    if (cell.clip) linear.clip = cell.clip[0];
    if (const int32_t status = msq_pack_params(&linear, cell.params[i])) return status;
  }
  return msq_pack_weights(cell.isa, cell.codes, any.outputs, any.inputs, cell.bits, cell.weights);
}

int32_t refresh(const MsqWatchedLinear& cell) {
  if (!has_changed(*cell.pages)) return MSQ_OK;
  const std::lock_guard<std::mutex> lock(packing);
  if (!has_changed(*cell.pages)) return MSQ_OK;
  watch(*cell.pages);  // first, so that a write during the packing counts for the next call
  const int32_t status = pack(cell);
  if (status) cell.pages->changed.store(1);
  return status;
}

int64_t element(const char* dtype) {
  if (!strcmp(dtype, "float32") || !strcmp(dtype, "int32")) return 4;
  return strcmp(dtype, "int8") ? 0 : 1;
}

// An array as an operator gets it. It is the one in the pages, unless MindSpore has moved the
// parameter's memory; what mixed precision made of it is another number's business.
void adopt(const MsqWatchedLinear& cell, int64_t offset, const void* given, int ndims,
           const int64_t* shape, const char* dtype) {
  int64_t bytes = element(dtype);
  for (int i = 0; i < ndims; ++i) bytes *= shape[i];
  uint8_t* own = cell.pages->start.load() + offset;
  if (own != given && bytes && memcmp(own, given, static_cast<size_t>(bytes)))
    memcpy(own, given, static_cast<size_t>(bytes));
}

}  // namespace
}  // namespace msq

using namespace msq;

uint64_t msq_process(void) {
  static const uint64_t drawn = static_cast<uint64_t>(
      std::chrono::steady_clock::now().time_since_epoch().count() ^
      std::chrono::system_clock::now().time_since_epoch().count() * 0x9e3779b97f4a7c15);
  return drawn;
}

int32_t msq_watched_linear(const MsqWatchedLinear* cell, int32_t phase, const float* x,
                           int64_t rows, float* y, int32_t threads) {
  if (const int32_t status = refresh(*cell)) return status;
  const int i = phase && cell->params[1];
  return msq_linear(cell->weights, cell->weights_bytes, cell->params[i], cell->params_bytes[i], x,
                    rows, y, threads);
}

int MsqWatchedOp(int nparam, void** params, int* ndims, int64_t** shapes, const char** dtypes,
                 void*, void*) {
  constexpr int kArrays = 3;  // come after the input, the linear and the phase
  const int last = nparam - 1;
  if (last < kArrays || ndims[0] != 2 || ndims[1] != 1 || ndims[last] != 2 ||
      shapes[1][0] != static_cast<int64_t>(sizeof(MsqWatchedLinear)))
    return MSQ_BAD_ARGUMENT;
  if (strcmp(dtypes[0], "float32") || strcmp(dtypes[1], "uint8") || strcmp(dtypes[2], "int32") ||
      strcmp(dtypes[last], "float32") || shapes[0][0] != shapes[last][0])
    return MSQ_BAD_ARGUMENT;
  MsqWatchedLinear cell;
  memcpy(&cell, params[1], sizeof cell);
  if (cell.process != msq_process()) return MSQ_BAD_BLOB;  // of a graph that was stored
  if (last - kArrays != cell.arrays || shapes[0][1] != cell.phases[0].inputs ||
      shapes[last][1] != cell.phases[0].outputs)
    return MSQ_BAD_ARGUMENT;
  for (int i = kArrays; i < last; ++i)
    adopt(cell, cell.offsets[i - kArrays], params[i], ndims[i], shapes[i], dtypes[i]);
  const int32_t phase = *static_cast<const int32_t*>(params[2]);
  return msq_watched_linear(&cell, phase, static_cast<const float*>(params[0]), shapes[0][0],
                            static_cast<float*>(params[last]), operator_threads.load());
}

void msq_set_threads(int32_t threads) { operator_threads.store(threads < 1 ? 1 : threads); }
