// The module ffvt._C: what this build is, and what this CPU can do.
//
// The CPU is asked directly (cpuid): PyTorch's own functions for it change from release to release.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false, amx_fp16 = false;
#if defined(__x86_64__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;    // leaf 7.0, edx
  constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxFp16 = 1u << 21;  // leaf 7.1, eax
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  bool amx_tile = false;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    amx_tile = edx & kAmxTile;
    amx_bf16 = amx_tile && (edx & kAmxBf16);
  }
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    avx512_bf16 = avx512 && (eax & kAvx512Bf16);
    amx_fp16 = amx_tile && (eax & kAmxFp16);
  }
#endif
  py::dict facts;
  facts["avx2"] = avx2;
  facts["avx512"] = avx512;
  facts["avx512_bf16"] = avx512_bf16;
  facts["amx_bf16"] = amx_bf16;
  facts["amx_fp16"] = amx_fp16;
  facts["threads"] = at::get_num_threads();
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts of the ffvt extension and the capabilities of this CPU.";
  module.def("build_info", &build_info, "Compiler, PyTorch version and build kind, as a dict.");
  module.def("cpu_info", &cpu_info,
             "Vector and matrix instructions of this CPU and PyTorch's thread count, as a dict.");
}
