// What the files of the CUDA runtime share.
#pragma once
#include <cuda_runtime_api.h>

#include "captures.h"

// Keeps an error as the thread's last one, and returns it.
cudaError_t result(cudaError_t error);
const cudaError_t UNSUPPORTED = cudaErrorStreamCaptureUnsupported;
// What nearly all of the runtime's calls do in a thread of their own.
void fake_make_context_current();
// Whether the stream is not destroyed; a call on one that is is a violation.
bool alive(void* stream, const char* call);
