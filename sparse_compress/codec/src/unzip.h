// The UNZIP weight codec of the Atlas 300I Duo (Ascend 310P); see docs/unzip_format.md.
//
// Plain C ABI without global state. Every function may be called from several threads at once.
#ifndef SPARSE_COMPRESS_UNZIP_H_
#define SPARSE_COMPRESS_UNZIP_H_

#include <stdint.h>

#if defined(_WIN32)
#define UNZIP_API __declspec(dllexport)
#else
#define UNZIP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// What a call returns.
enum {
  UNZIP_OK = 0,
  UNZIP_BAD_TILE = 1,      // decoding only: the failure tells where and why
  UNZIP_BAD_ARGUMENT = 2,  // sizes, offsets or mode that no caller should pass
  UNZIP_NO_MEMORY = 3
};

// Why a coded tile is refused.
enum {
  UNZIP_UNKNOWN_MODE = 1,
  UNZIP_OTHER_MODE = 2,
  UNZIP_WRONG_LENGTH = 3,
  UNZIP_RESERVED_HEADER = 4,
  UNZIP_DICTIONARY_DIFFERS = 5,
  UNZIP_STRADDLE = 6,
  UNZIP_UNUSED_CODE = 7,
  UNZIP_PAST_LENGTH = 8,
  UNZIP_PAST_WINDOW = 9,
  UNZIP_EARLY_END = 10,
  UNZIP_MISSING_END = 11,
  UNZIP_PADDING = 12,
  UNZIP_CHECKSUM = 13
};

// The first bad engine of the first bad tile. `value` is the number that the message shows: a
// header field for the first five causes, the XOR of the decoded bytes for the last one, and the
// raw bytes written so far for the others.
typedef struct {
  int64_t tile;
  int64_t value;
  int32_t engine;
  int32_t cause;
} unzip_failure;

// Changes whenever a signature or a number above does.
UNZIP_API int32_t unzip_abi_version(void);

// How often each byte value occurs.
UNZIP_API void unzip_count(const uint8_t* stream, int64_t stream_bytes, int64_t* counts);

// Codes `tiles` tiles of `tile_sizes` raw bytes that lie back to back in `stream`.
// `mode` is the first byte of the engine headers (0xA8 low, 0x88 high); `dictionary` holds 36 or
// 34 distinct bytes by rank. `weight` has room for `stream_bytes`; the stored tiles go there back
// to back, their lengths into `stored`, and 1 (coded) or 0 (raw) into `coded`.
UNZIP_API int32_t unzip_encode(const uint8_t* stream, int64_t stream_bytes,
                               const int64_t* tile_sizes, int64_t tiles, int32_t mode,
                               const uint8_t* dictionary, int32_t threads, uint8_t* weight,
                               int64_t* stored, uint8_t* coded);

// Decodes tiles that lie anywhere in `weight` into `stream`, back to back.
UNZIP_API int32_t unzip_decode(const uint8_t* weight, int64_t weight_bytes, const int64_t* offsets,
                               const int64_t* stored, const uint8_t* coded,
                               const int64_t* tile_sizes, int64_t tiles, int32_t mode,
                               int32_t threads, uint8_t* stream, int64_t stream_bytes,
                               unzip_failure* failure);

#ifdef __cplusplus
}
#endif

#endif  // SPARSE_COMPRESS_UNZIP_H_
