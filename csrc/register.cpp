// The modules ffvt._cpu_<capability>: operator -> function, compiled for one set of instructions each.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels.h"
#include "products.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "ffvt's operators for CPUs, compiled for one set of instructions; see csrc/kernels.h.";
  module.def("maws_attention_forward", torch::wrap_pybind_function_no_gil(ffvt::maws_attention_forward));
  module.def("maws_attention_backward", torch::wrap_pybind_function_no_gil(ffvt::maws_attention_backward));
  module.def("attention_stats_forward", torch::wrap_pybind_function_no_gil(ffvt::attention_stats_forward));
  module.def("attention_forward", torch::wrap_pybind_function_no_gil(ffvt::attention_forward));
  module.def("attention_vecmat_forward", torch::wrap_pybind_function_no_gil(ffvt::attention_vecmat_forward));
  module.def("attention_products", torch::wrap_pybind_function_no_gil(ffvt::attention_products));
  module.def("maws_select_forward", torch::wrap_pybind_function_no_gil(ffvt::maws_select_forward));
  module.def("gather_tokens_forward", torch::wrap_pybind_function_no_gil(ffvt::gather_tokens_forward));
  module.def("gather_tokens_backward", torch::wrap_pybind_function_no_gil(ffvt::gather_tokens_backward));
  module.def("augment", torch::wrap_pybind_function_no_gil(ffvt::augment));
  module.def("dropout", torch::wrap_pybind_function_no_gil(ffvt::dropout));
  module.def("bf16_products", &ffvt::bf16_products, "Whether products of bf16 tensors take bf16; else fp32, widened.");
  module.def("force_products", &ffvt::force_products,
             "The operands of these products: bf16, fp32, or auto, the faster.");
  module.def(
      "product_rates",
      [] {
        const auto [bf16, fp32] = ffvt::product_rates();
        return std::pair(bf16, fp32);
      },
      "GFLOP/s of one thread with bf16 and with fp32 operands.");
}
