// Quantized linears on CPU, called through ctypes or as MindSpore custom operators.
//
// A linear is two blobs of bytes. `weights` holds the codes in the layout of one instruction set;
// `params` holds what the input is quantized with and what the sums are multiplied by. Both are
// made once, begin with a header that every call checks, and may lie at any address aligned to 8
// bytes, 64 is faster. docs/kernels.md states what is computed and how exactly.

#ifndef MS_QUANT_KERNELS_H_
#define MS_QUANT_KERNELS_H_

#include <stdint.h>

#define MSQ_API extern "C" __attribute__((visibility("default")))

enum MsqStatus {
  MSQ_OK = 0,
  MSQ_BAD_ARGUMENT = 1,
  MSQ_BAD_BLOB = 2,
  MSQ_NO_MEMORY = 3,
  MSQ_NO_ISA = 4,
  MSQ_NOT_FINITE = 5,      // NaN or inf, where there may be none
  MSQ_OFFSETS_DIFFER = 6,  // of the channels of a static input
  MSQ_NOT_INT4 = 7         // a code
};

// Instruction sets, slowest first; msq_pack takes one of them or MSQ_BEST.
enum MsqIsa {
  MSQ_BEST = -1,
  MSQ_SCALAR = 0,
  MSQ_AVX2 = 1,
  MSQ_AVX_VNNI = 2,
  MSQ_AVX512_VNNI = 3,
  MSQ_NEON_DOT = 4,
  MSQ_NEON_I8MM = 5,
  MSQ_AMX = 6,
  MSQ_ISAS = 7
};

// How the input is quantized.
enum MsqInput { MSQ_FLOAT = 0, MSQ_PER_TOKEN = 1, MSQ_STATIC = 2 };

// What a linear computes with. Arrays are contiguous; those that are null are left out.
typedef struct {
  int64_t outputs, inputs;
  int64_t group;              // inputs that share a scale; `inputs` for per-channel
  int32_t input;              // MsqInput
  int32_t smallest, largest;  // codes of the input
  float clip;                 // factor on each token's range
  float offset;               // zero point of a static input
  const float* mul;           // (inputs) the input is multiplied by first
  const float* input_scale;   // (inputs) a static input is divided by, or null for
  const float* input_factor;  // (inputs) what it is multiplied by
  const float* scale;         // (outputs, inputs / group) of the weight, or of sums
  const float* row_scale;     // (outputs) on top of `scale`
  const int8_t* zero_point;   // (outputs, inputs / group) of the weight
  const int32_t* int_bias;    // (outputs) added to integer sums
  const float* bias;          // (outputs)
} MsqLinear;

MSQ_API int32_t msq_abi_version(void);
MSQ_API int32_t msq_best_isa(void);
MSQ_API int32_t msq_has_isa(int32_t isa);
// From now on the process has no instruction set above this one: for tests. Call it first of all.
MSQ_API void msq_limit_isa(int32_t isa);

// Bytes of the blobs, or -1 for arguments that make none.
MSQ_API int64_t msq_weights_bytes(int32_t isa, int64_t outputs, int64_t inputs, int32_t bits);
MSQ_API int64_t msq_params_bytes(const MsqLinear* linear);

// codes: int8 (outputs, inputs), of 8 or 4 bits.
MSQ_API int32_t msq_pack_weights(int32_t isa, const int8_t* codes, int64_t outputs, int64_t inputs,
                                 int32_t bits, uint8_t* weights);
MSQ_API int32_t msq_pack_params(const MsqLinear* linear, uint8_t* params);

// y (rows, outputs) of x (rows, inputs).
MSQ_API int32_t msq_linear(const uint8_t* weights, int64_t weights_bytes, const uint8_t* params,
                           int64_t params_bytes, const float* x, int64_t rows, float* y,
                           int32_t threads);

// Codes int8 (rows, columns) and scales (rows) of x: symmetric, one scale a row, rounded up so that
// its last `cleared` bits, less than 23, are 0.
MSQ_API int32_t msq_quantize_rows(int32_t isa, const float* x, int64_t rows, int64_t columns,
                                  int32_t smallest, int32_t largest, float clip, int32_t cleared,
                                  int8_t* codes, float* scales, int32_t threads);

// The same of rows as they are stored: with block_scales (rows, ceil(columns / width)) they are
// E4M3 codes, each times the scale of its run of `width` columns, and else bfloat16. NaN and
// infinity among them or the products are refused, and all that is written is undefined then.
MSQ_API int32_t msq_quantize_stored(int32_t isa, const void* stored, const float* block_scales,
                                    int64_t width, int64_t rows, int64_t columns, int32_t smallest,
                                    int32_t largest, int32_t cleared, int8_t* codes, float* scales,
                                    int32_t threads);

// What a decoder block does between its linears, in float32.
// y = x / sqrt(mean(x^2) + eps) * weight of each of `rows` rows of `size`.
MSQ_API int32_t msq_rms_norm(int32_t isa, const float* x, const float* weight, int64_t rows,
                             int64_t size, float eps, float* y, int32_t threads);
// y = gate / (1 + e^-gate) * up
MSQ_API int32_t msq_swiglu(int32_t isa, const float* gate, const float* up, int64_t count, float* y,
                           int32_t threads);
// y (batch, heads, length, size) of x (batch, length, heads, size), turned as rotary positions are;
// cos and sin are (length, size), size even.
MSQ_API int32_t msq_rope(int32_t isa, const float* x, const float* cos, const float* sin,
                         int64_t batch, int64_t length, int64_t heads, int64_t size, float* y,
                         int32_t threads);
// Softmax of x * scale + mask in place: x (rows, columns), of which every `rows_of_mask` rows, a
// multiple of `length`, share a mask (length, columns) and go round in it.
MSQ_API int32_t msq_softmax(int32_t isa, float* x, const float* mask, int64_t rows, int64_t columns,
                            int64_t length, int64_t rows_of_mask, float scale, int32_t threads);
// y (batch, length, heads, size): softmax(q k^T * scale + mask) v of q (batch, heads, length, size)
// and k and v (batch, kv_heads, total, size), which heads / kv_heads heads share. The mask is
// (masks, length, total) for 1 or `batch` masks. A key below -1e29 in it has no weight.
MSQ_API int32_t msq_attention(int32_t isa, const float* q, const float* k, const float* v,
                              const float* mask, int64_t batch, int64_t heads, int64_t kv_heads,
                              int64_t length, int64_t total, int64_t size, int64_t masks,
                              float scale, float* y, int32_t threads);

// Numbers from one item of a batch, one head and one token to the next; those of a token lie side
// by side.
typedef struct {
  int64_t batch, head, token;
} MsqSteps;

// Queries, keys or values (batch, heads, tokens, size): floats, or codes with contiguous scales
// (batch, heads, ceil(tokens / rows), ceil(size / columns)), each of which `rows` tokens and
// `columns` columns share.
enum { MSQ_FLOATS = 0, MSQ_INT8 = 1, MSQ_E4M3 = 2 };
typedef struct {
  const void* data;
  MsqSteps steps;
  const float* scales;
  int64_t rows, columns;
  int32_t kind;
} MsqOperand;

// What a query keeps: keys of blocks that are not 0 (null: all), within its head's band and the
// first tokens, among the leading ones, and not padding. With an order all of this but padding is
// of places, and so are codes, which are stored in that order; floats, padding and y are of tokens.
typedef struct {
  MsqOperand q, k, v;
  int64_t batch, heads, queries, keys, size, value_size;
  const int64_t* order;   // (order_heads, queries): the token at each place; or null
  int64_t order_heads;    // 1, or as many as there are
  const uint8_t* blocks;  // (block_batches, block_heads, blocks of queries, blocks of keys)
  int64_t block_batches, block_heads;  // 1, or as many as there are
  int64_t block_queries, block_keys;   // tokens of a block
  const int64_t* band;     // (heads): a key is at most so far from a query; -1 for any; or null
  int64_t first;           // tokens that are beside every band, as keys and as queries
  const int64_t* leading;  // (heads): queries after the first see so many keys; -1 for all; or null
  const uint8_t* kept;     // (batch, keys): 0 for padding, else 1; or null
  float scale;
  float* y;  // (batch, heads, queries, value_size)
  MsqSteps y_steps;
} MsqBlockAttention;

// y = softmax(q k^T * scale) v over the keys that are kept; zeros where there are none.
MSQ_API int32_t msq_block_attention(int32_t isa, const MsqBlockAttention* attention,
                                    int32_t threads);

// y (batch, heads, blocks, size): the mean of each `block` tokens of x (batch, heads, tokens, size)
// in an order (tokens), null for as they come; of the last block those that it has.
MSQ_API int32_t msq_block_means(const MsqOperand* x, int64_t batch, int64_t heads, int64_t tokens,
                                int64_t size, const int64_t* order, int64_t block, float* y,
                                int32_t threads);

// Codes (batch, heads, tokens, size) and scales of finite floats x, as blocks of y's rows, columns
// and kind have them: absmax / 127, or 1, of int8, and absmax / 448 of e4m3; or scales that are
// given. Tokens are put in an order (order_heads, tokens), null for as they come.
MSQ_API int32_t msq_quantize_heads(const MsqOperand* x, const MsqOperand* y, int64_t batch,
                                   int64_t heads, int64_t tokens, int64_t size,
                                   const int64_t* order, int64_t order_heads, int32_t given,
                                   uint8_t* codes, float* scales, int32_t threads);

// y (rows, outputs) = x (rows, inputs) w^T + bias of w (outputs, inputs) in float32 or bfloat16;
// `bias` may be null. What a row gets does not depend on the other rows.
MSQ_API int32_t msq_row_products(int32_t isa, const void* w, int32_t bfloat16, int64_t outputs,
                                 int64_t inputs, const float* bias, const float* x, int64_t rows,
                                 float* y, int32_t threads);

// Attention of sequences that have one query each: q (sequences, heads, size); the keys of a
// sequence (kv_heads, lengths[i], size) with so many floats from head to head, its values
// (kv_heads, lengths[i], value_size) -> y (sequences, heads, value_size). What a sequence gets does
// not depend on the others.
typedef struct {
  int64_t sequences, heads, kv_heads, size, value_size;
  const float* q;
  const float *const *keys, *const *values;
  const int64_t *lengths, *key_strides, *value_strides;
  float scale;
  float* y;
  int32_t failed;  // is set where there was no memory
} MsqStepAttention;
MSQ_API int32_t msq_step_attention(int32_t isa, MsqStepAttention* step, int32_t threads);

// How many rows of floats msq_linear takes at a time so that none changes what another gets; for
// quantized inputs that is so for any number. -1 if the blob is damaged.
MSQ_API int64_t msq_rows_alike(const uint8_t* weights, int64_t weights_bytes);

// x (rows, order, width) in place: the Sylvester matrix of an order 2^k times each row, divided;
// with the sums of numerics/rotation.py, bit for bit.
MSQ_API int32_t msq_hadamard(double* x, int64_t rows, int64_t order, int64_t width, double divisor);

// y (rows, outputs) = x (rows, inputs) w^T + bias in float32, faster than any library without AMX;
// MSQ_NO_ISA where the machine has it not. `bias` may be null. NaN, infinities and magnitudes above
// 3.3e38 are refused, and y is undefined then.
MSQ_API int32_t msq_product(const float* x, int64_t rows, const float* w, int64_t outputs,
                            int64_t inputs, const float* bias, float* y, int32_t threads);

// Adds x^T x of x (rows, columns) to the lower triangle of `products` (columns, columns), in the
// same way. Only the lower triangle is defined afterwards.
MSQ_API int32_t msq_syrk(const float* x, int64_t rows, int64_t columns, float* products,
                         int32_t threads);

// Adds x (rows, columns) to the statistics of its columns: smallest and largest, and the sums of
// squares and of magnitudes.
MSQ_API int32_t msq_column_stats(int32_t isa, const float* x, int64_t rows, int64_t columns,
                                 float* low, float* high, double* squares, double* sizes,
                                 int32_t threads);

// Memory of which is known whether it was written to. Null without memory.
typedef struct MsqPages MsqPages;
MSQ_API MsqPages* msq_pages_new(int64_t bytes);
MSQ_API void msq_pages_free(MsqPages* pages);
MSQ_API uint8_t* msq_pages_start(const MsqPages* pages);
MSQ_API int32_t msq_pages_changed(const MsqPages* pages);  // since they were watched, or ever
MSQ_API void msq_pages_watch(MsqPages* pages);

// A linear whose arrays lie in such pages; all it computes with follows them.
enum { MSQ_MOST_ARRAYS = 16 };
// The types in which a runtime holds a static input's scale and the reciprocal that it multiplies
// by.
enum { MSQ_FLOAT32 = 0, MSQ_BFLOAT16 = 1, MSQ_FLOAT16 = 2 };
typedef struct {
  uint64_t process;  // msq_process(): addresses below are of this process
  MsqPages* pages;
  MsqLinear phases[2];   // in decode the second, if it has params
  const int8_t* offset;  // (inputs), all the same: takes the place of MsqLinear's; or null
  const float* clip;     // (1), in the same way
  const float* divisor;  // (inputs), whose rounded reciprocals are written to `factor`; or null
  float* factor;         // the MsqLinear::input_factor of both phases
  int32_t held_in;       // the type that they are rounded to
  const int8_t* codes;   // as for msq_pack_weights
  int32_t isa, bits;
  uint8_t *weights, *params[2];  // where it is packed to
  int64_t weights_bytes, params_bytes[2];
  int64_t offsets[MSQ_MOST_ARRAYS];  // of the arrays in the pages, as the operator is given them
  int64_t arrays;
} MsqWatchedLinear;

MSQ_API uint64_t msq_process(void);  // a number that other processes have not
// As msq_linear, and packs what has changed before.
MSQ_API int32_t msq_watched_linear(const MsqWatchedLinear* linear, int32_t phase, const float* x,
                                   int64_t rows, float* y, int32_t threads);
// The same in the form of a custom operator: x, the bytes of a MsqWatchedLinear, the phase as one
// int32, the arrays -> y.
MSQ_API int MsqWatchedOp(int nparam, void** params, int* ndims, int64_t** shapes,
                         const char** dtypes, void* stream, void* extra);

MSQ_API void msq_set_threads(int32_t threads);  // of MsqWatchedOp

#endif  // MS_QUANT_KERNELS_H_
