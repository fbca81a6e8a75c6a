#ifndef MS_QUANT_CHECK_SPARSE_ATTENTION_H_
#define MS_QUANT_CHECK_SPARSE_ATTENTION_H_

namespace check {

// Block-sparse attention of random sizes, masks and codes is what the portable one computes.
void check_sparse_attention(int isa);
// Means of blocks in any order are those in float64, nearly.
void check_block_means();
// Codes of blocks in any order are within half a step of their numbers.
void check_quantize_heads();

}  // namespace check

#endif  // MS_QUANT_CHECK_SPARSE_ATTENTION_H_
