// FlashInfer's XQA decode as a function that XLA calls, for the shape that the macros of
// csrc/xqa/defines.h give. Keys and values are [page, token, kv head, channel].

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "mha.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// What XQA asks of the driver is found when it is called: so this library loads, and programs that
// call it compile, where there is no driver.
template <typename Function>
static Function driver(Function, char const* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  if (found == nullptr) throw std::runtime_error(std::string("the driver has no ") + name);
  return reinterpret_cast<Function>(found);
}

extern "C" CUresult cuGetErrorName(CUresult error, char const** name) {
  return driver(&cuGetErrorName, "cuGetErrorName")(error, name);
}

extern "C" CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    cuuint64_t const* dims, cuuint64_t const* strides, cuuint32_t const* box,
    cuuint32_t const* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return driver(&cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled")(
      map, type, rank, address, dims, strides, box, element_strides, interleave, swizzle, promotion,
      fill);
}

using Bfloat16s = ffi::Buffer<ffi::BF16>;
using Counts = ffi::Buffer<ffi::U32>;

// One query of each row, [row, 1, kv head, query, channel], over the pages of its table. The
// semaphores are zero before and after. Scratch is an array of XLA's: what a call allocates it
// frees, while the CUDA graph that was made of it goes on.
static ffi::Error decode(cudaStream_t stream, Bfloat16s queries, ffi::AnyBuffer keys,
                         ffi::AnyBuffer values, ffi::Buffer<ffi::S32> tables, Counts lengths,
                         Counts semaphores, ffi::Result<Bfloat16s> out,
                         ffi::Result<ffi::Buffer<ffi::U8>> scratch) {
  auto const rows = static_cast<uint32_t>(tables.dimensions()[0]);
  auto const pages = static_cast<uint32_t>(tables.dimensions()[1]);
  auto const kv_heads = static_cast<uint32_t>(keys.dimensions()[2]);
  uint64_t const token = kv_heads * uint64_t{HEAD_ELEMS};
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
#if CACHE_ELEM_ENUM == 0
  auto const launch = launchMHAFlashInfer;
#else
  auto const launch = launchHopperF8MHAFlashInfer;
#endif
  try {
    launch(multiprocessors, kv_heads, /*slidingWinSize=*/0, /*qScale=*/1, /*qScalePtr=*/nullptr,
           static_cast<OutputHead*>(out->untyped_data()),
           static_cast<InputHead const*>(queries.untyped_data()), /*attentionSinks=*/nullptr,
           static_cast<GMemCacheHead*>(keys.untyped_data()),
           static_cast<GMemCacheHead*>(values.untyped_data()), tables.typed_data(),
           pages * TOKENS_PER_PAGE, lengths.typed_data(), rows, /*kvCacheScale=*/1,
           /*kvScalePtr=*/nullptr, semaphores.typed_data(), scratch->untyped_data(),
           // XLA captures each call by itself: there is no kernel before it to overlap with.
           /*enable_pdl=*/false, TOKENS_PER_PAGE * token, token, HEAD_ELEMS, stream);
  } catch (std::exception const& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* attend(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend, decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Bfloat16s>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Counts>()
                                  .Arg<Counts>()
                                  .Ret<Bfloat16s>()
                                  .Ret<ffi::Buffer<ffi::U8>>(),
                              {ffi::Traits::kCmdBufferCompatible});
