// Runs a saved module with TVM's runtime and nothing else: no Python, no compiler, no opferry.
//
//   run_module FOLDER/module.so DIM... < x.f32 > y.f32
//
// For a module with one float32 input of shape DIM... and one float32 output, row-major and in this
// machine's byte order. What `Module.run` checks in Python (dtypes, agreeing dimensions, the rules
// in manifest.json) is the caller's duty here.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <iterator>
#include <new>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

// Generated code may load whole cache lines: 64 bytes is the alignment that TVM itself gives.
struct AlignedMemory {
  static constexpr size_t kAlignment = 64;
  void AllocData(DLTensor* tensor) {
    const size_t size = ffi::GetDataSize(*tensor);
    tensor->data = std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

// A virtual machine is made from the library's executable and told its device and allocator.
ffi::Function LoadMain(const std::string& library) {
  ffi::Module executable = ffi::Module::LoadFromFile(library);
  auto machine = (*executable->GetFunction("vm_load_executable"))().cast<ffi::Module>();
  const int pooled = 2;  // tvm::runtime::memory::AllocatorType::kPooled
  (*machine->GetFunction("vm_initialization"))(static_cast<int>(kDLCPU), 0, pooled);
  return *machine->GetFunction("main");
}

std::vector<char> ReadAll(std::istream& in) {
  return std::vector<char>(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
}

int Run(const std::string& library, const std::vector<int64_t>& shape) {
  ffi::Function main = LoadMain(library);

  ffi::Tensor x = ffi::Tensor::FromNDAlloc(AlignedMemory(), ffi::Shape(shape),
                                           DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
  const std::vector<char> bytes = ReadAll(std::cin);
  if (bytes.size() != ffi::GetDataSize(x)) {
    std::fprintf(stderr, "stdin: found %zu bytes, allowed the %zu of the shape given\n",
                 bytes.size(), ffi::GetDataSize(x));
    return 2;
  }
  std::memcpy(x.data_ptr(), bytes.data(), bytes.size());

  ffi::Tensor y = main(x).cast<ffi::Tensor>();

  std::fprintf(stderr, "output");
  for (int64_t dim : y.shape()) std::fprintf(stderr, " %lld", static_cast<long long>(dim));
  std::fprintf(stderr, "\n");
  std::cout.write(static_cast<const char*>(y.data_ptr()), ffi::GetDataSize(y));
  return std::cout.flush() ? 0 : 1;
}

int main(int argc, char** argv) {
  std::vector<int64_t> shape;
  for (int i = 2; i < argc; ++i) shape.push_back(std::atoll(argv[i]));
  if (shape.empty() || *std::min_element(shape.begin(), shape.end()) < 1) {
    std::fprintf(stderr, "usage: %s FOLDER/module.so DIM... < x.f32 > y.f32\n", argv[0]);
    return 2;
  }
  try {
    return Run(argv[1], shape);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
