// FlashAttention 4 over pages, causal, as a function that XLA calls. Keys and values are
// [page, token, kv head, channel]. What fa4.h declares, export_fa4.py made.

#include <cmath>
#include <string>

// Its place is taken by nothing: fa4.h includes it and needs none of it, and its own headers are in
// another of CUDA's packages.
#define __CUDA_FP16_H__
#include "fa4.h"

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Bfloat16s = ffi::Buffer<ffi::BF16>;
using Integers = ffi::Buffer<ffi::S32>;

// Its kernel is in this library and is given to the driver once.
static fa4_Kernel_Module_t* loaded() {
  static fa4_Kernel_Module_t module = [] {
    fa4_Kernel_Module_t fresh{};
    fa4_Kernel_Module_Load(&fresh);
    return fresh;
  }();
  return &module;
}

// Queries are [row, token, kv head, query, channel]; a prompt's rows follow each other, and each
// has the prompt's whole page table. Of a prompt: where its queries begin, with the end of the last
// one's behind it, how many there are, and how many keys they see.
static ffi::Error prefill(cudaStream_t stream, Bfloat16s queries, Bfloat16s keys, Bfloat16s values,
                          Integers tables, Integers begins, Integers num_queries, Integers num_keys,
                          ffi::Result<Bfloat16s> out) {
  auto const shape = queries.dimensions();
  auto const pages = keys.dimensions();
  auto const size = [](int64_t number) { return static_cast<int32_t>(number); };
  int32_t const tokens = size(shape[0] * shape[1]), heads = size(shape[2] * shape[3]);
  int32_t const prompts = size(num_keys.element_count());
  int64_t const row = heads * int64_t{HEAD_DIM}, token = pages[2] * int64_t{HEAD_DIM};
  int64_t const page = pages[1] * token, table = tables.element_count() / prompts;

  fa4_Tensor_queries_t q{queries.untyped_data(), {tokens, heads, HEAD_DIM}, {row, HEAD_DIM}};
  fa4_Tensor_out_t o{out->untyped_data(), {tokens, heads, HEAD_DIM}, {row, HEAD_DIM}};
  fa4_Tensor_keys_t k{
      keys.untyped_data(), {size(pages[0]), size(pages[2])}, {page, token, HEAD_DIM}};
  fa4_Tensor_values_t v{
      values.untyped_data(), {size(pages[0]), size(pages[2])}, {page, token, HEAD_DIM}};
  fa4_Tensor_tables_t t{
      tables.untyped_data(), {prompts, size(tables.dimensions()[1])}, {table}};
  fa4_Tensor_begins_t b{begins.untyped_data(), {prompts + 1}};
  fa4_Tensor_num_queries_t used{num_queries.untyped_data(), {prompts}};
  fa4_Tensor_num_keys_t seen{num_keys.untyped_data(), {prompts}};
  auto const scale = static_cast<float>(1 / std::sqrt(double{HEAD_DIM}));
  int32_t const status =
      cute_dsl_fa4_wrapper(loaded(), &q, &k, &v, &t, &b, &used, &seen, &o, scale, stream);
  if (status != 0)
    return ffi::Error::Internal("FlashAttention 4 ends with " + std::to_string(status));
  return ffi::Error::Success();
}

// Not for command buffers: to be given to the driver is nothing that a graph can hold.
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
                                  .Arg<Integers>()
                                  .Ret<Bfloat16s>());
