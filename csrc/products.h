// Which operands the products of bf16 tensors take: bf16, as the tensors are, or fp32, widened.

#pragma once

#include <string>

namespace ffvt {

// GFLOP/s of one thread in products of the kernels' tiles, by their operands. bf16 is zero where there are no such
// products or they are not right; both are where oneDNN is switched off (torch.backends.mkldnn).
struct ProductRates {
  double bf16, fp32;
};

// Measured once, at the first call: about four milliseconds.
ProductRates product_rates();

// Whether products of bf16 tensors take bf16: where that is right and, unless one is forced, the faster.
bool bf16_products();

// The operands from now on: "bf16", "fp32", or "auto", the faster of them. ValueError for another name, and for bf16
// where its products are not right.
void force_products(const std::string& operands);

}  // namespace ffvt
