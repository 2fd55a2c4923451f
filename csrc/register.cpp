// The modules ffvt._cpu_<capability>: operator -> function, compiled for one set of instructions each.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels.h"

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
  module.def("multiplies_bf16", &ffvt::multiplies_bf16,
             "Whether bf16 is multiplied by instructions for it; else it is widened to fp32.");
}
