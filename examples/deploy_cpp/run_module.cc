// Runs a saved module with TVM's runtime and nothing else: no Python, no compiler, no opferry.
//
//   run_module FOLDER/module.so COLUMNS < x.f32 > y.f32
//
// For a module with one float32 input (rows, COLUMNS) and one float32 output. Standard input holds
// the rows, in this machine's byte order; however many there are, the module takes them if its
// first dimension is symbolic. What `Module.run` checks in Python (dtypes, agreeing dimensions, rules
// of manifest.json) is the caller's duty here.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

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

int Run(const std::string& library, int64_t columns) {
  ffi::Function main = LoadMain(library);

  std::vector<char> bytes = ReadAll(std::cin);
  const int64_t row = columns * static_cast<int64_t>(sizeof(float));
  if (columns < 1 || bytes.empty() || bytes.size() % row != 0) {
    std::fprintf(stderr, "stdin: found %zu bytes, allowed whole rows of %ld floats\n", bytes.size(),
                 static_cast<long>(columns));
    return 2;
  }
  const int64_t rows = static_cast<int64_t>(bytes.size()) / row;
  ffi::Tensor x = ffi::Tensor::FromNDAlloc(AlignedMemory(), {rows, columns},
                                           DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
  std::memcpy(x.data_ptr(), bytes.data(), bytes.size());

  ffi::Tensor y = main(x).cast<ffi::Tensor>();

  std::fprintf(stderr, "(%ld, %ld) -> (", static_cast<long>(rows), static_cast<long>(columns));
  for (int64_t dim : y.shape()) std::fprintf(stderr, " %ld", static_cast<long>(dim));
  std::fprintf(stderr, " )\n");
  std::cout.write(static_cast<const char*>(y.data_ptr()), ffi::GetDataSize(y));
  return std::cout.flush() ? 0 : 1;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s FOLDER/module.so COLUMNS < x.f32 > y.f32\n", argv[0]);
    return 2;
  }
  try {
    return Run(argv[1], std::atoll(argv[2]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
