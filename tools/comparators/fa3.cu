// FlashInfer's FlashAttention 3 over pages, causal, as a function that XLA calls, for 128 channels
// in bfloat16. Keys and values are [page, token, kv head, channel].

// Its place is taken by the two below: it includes what makes random numbers, too, whose headers are
// in another of CUDA's packages.
#define FLASHINFER_CUTLASS_UTILS_CUH_
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include <flashinfer/attention/hopper/default_params.cuh>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Bfloat16s = ffi::Buffer<ffi::BF16>;
using Integers = ffi::Buffer<ffi::S32>;
using Number = cutlass::bfloat16_t;
using Params = flashinfer::BatchPrefillPagedParams<Number, Number, Number, int32_t>;

// Queries are [row, token, kv head, query, channel], a prompt's one after the other. The work is cut
// into tiles, each a column: which tile of a prompt's queries, which head, where the prompt's
// queries and its page table begin, how many queries and keys it has, which prompt it is. A
// multiprocessor computes those from its start to the next one's (plan/flashinfer_work.py).
static ffi::Error prefill(cudaStream_t stream, Bfloat16s queries, Bfloat16s keys, Bfloat16s values,
                          Integers tables, Integers tiles, Integers starts,
                          ffi::Result<Bfloat16s> out) {
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (starts.element_count() != static_cast<size_t>(multiprocessors) + 1)
    return ffi::Error::InvalidArgument("the work is cut for another GPU, of " +
                                       std::to_string(starts.element_count() - 1) +
                                       " multiprocessors, not " + std::to_string(multiprocessors));
  auto const shape = queries.dimensions();
  auto const pages = keys.dimensions();
  auto const tile = [&](int row) { return tiles.typed_data() + row * tiles.dimensions()[1]; };
  Params params{};
  params.q_ptr = static_cast<Number*>(queries.untyped_data());
  params.k_ptr = static_cast<Number*>(keys.untyped_data());
  params.v_ptr = static_cast<Number*>(values.untyped_data());
  params.o_ptr = static_cast<Number*>(out->untyped_data());
  params.kv_indices = tables.typed_data();
  params.qo_tile_indices = tile(0);
  params.head_indices = tile(1);
  params.qo_indptr = tile(2);
  params.kv_indptr = tile(3);
  params.qo_lens = tile(4);
  params.kv_lens = tile(5);
  params.batch_indices = tile(6);
  params.work_indptr = starts.typed_data();
  params.additional_params.sm_scale = 1 / std::sqrt(128.f);
  params.page_size = static_cast<int>(pages[1]);
  params.num_kv_heads = static_cast<int>(shape[2]);
  params.group_size = static_cast<int>(shape[3]);
  params.num_qo_heads = params.num_kv_heads * params.group_size;
  params.nnz_qo = shape[0] * shape[1];
  params.q_stride_h = params.o_stride_h = params.k_stride_h = params.v_stride_h = 128;
  params.q_stride_n = params.o_stride_n = params.num_qo_heads * 128;
  params.k_stride_n = params.v_stride_n = params.num_kv_heads * 128;
  params.k_page_stride = params.v_page_stride = params.page_size * params.k_stride_n;
  params.window_left = -1;
  params.causal = true;
  try {
    cudaError_t const status = flashinfer::BatchPrefillWithPagedKVCacheDispatched<
        128, 128, flashinfer::MaskMode::kCausal, /*LEFT_SLIDING_WINDOW=*/false,
        /*SAME_SCHEDULE_FOR_ALL_HEADS=*/false, flashinfer::StandardAttention>(
        params, /*enable_pdl=*/false, stream);
    if (status != cudaSuccess) return ffi::Error::Internal(cudaGetErrorString(status));
  } catch (std::exception const& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* attend(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend, prefill,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Bfloat16s>()
                                  .Arg<Bfloat16s>()
                                  .Arg<Bfloat16s>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Ret<Bfloat16s>(),
                              {ffi::Traits::kCmdBufferCompatible});
