#ifndef MS_QUANT_AMX_PRODUCT_H_
#define MS_QUANT_AMX_PRODUCT_H_

#include <stdint.h>

#include "kernels.h"

namespace msq {

// y (rows, outputs) = x (rows, inputs) w^T + bias, of w (outputs, inputs); a status. None of
// the sizes is 0.
int amx_product(const float* x, int64_t rows, const float* w, int64_t outputs, int64_t inputs,
                const float* bias, float* y, int threads);

// Adds x^T x of x (rows, columns) to the lower triangle of `products` (columns, columns). Only the
// lower triangle is defined afterwards.
int amx_syrk(const float* x, int64_t rows, int64_t columns, float* products, int threads);

}  // namespace msq

#endif  // MS_QUANT_AMX_PRODUCT_H_
