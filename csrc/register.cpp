// The module ffvt._C: what this build is, and what this CPU can do.

#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["torch_built_against"] = TORCH_VERSION;
#ifdef NDEBUG
  facts["debug"] = false;
#else
  facts["debug"] = true;
#endif
  return facts;
}

py::dict cpu_info() {
  py::dict facts;
  facts["avx2"] = at::cpu::is_avx2_supported();
  facts["avx512"] = at::cpu::is_avx512_supported();
  facts["avx512_bf16"] = at::cpu::is_avx512_bf16_supported();
  facts["amx_bf16"] = at::cpu::is_amx_tile_supported();
  facts["threads"] = at::get_num_threads();
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts of the ffvt extension and the capabilities of this CPU.";
  module.def("build_info", &build_info, "Compiler, PyTorch version and build kind, as a dict.");
  module.def("cpu_info", &cpu_info, "Vector and matrix instructions of this CPU and PyTorch's thread count, as a dict.");
}
