// The modules ffvt._cpu_<capability>: operator -> function, compiled for one set of instructions each.

#include <torch/csrc/utils/pybind.h>

#include "kernels.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "ffvt's operators for CPUs, compiled for one set of instructions; see csrc/kernels.h.";
  const auto without_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  module.def("maws_attention_forward", &ffvt::maws_attention_forward, without_gil);
  module.def("maws_attention_backward", &ffvt::maws_attention_backward, without_gil);
  module.def("maws_select_forward", &ffvt::maws_select_forward, without_gil);
  module.def("gather_tokens_forward", &ffvt::gather_tokens_forward, without_gil);
  module.def("gather_tokens_backward", &ffvt::gather_tokens_backward, without_gil);
  module.def("augment", &ffvt::augment, without_gil);
  module.def("multiplies_bf16", &ffvt::multiplies_bf16,
             "Whether bf16 is multiplied by instructions for it; else it is widened to fp32.");
}
