// Adds the KV cache, attention, norms and the thread pool of csrc/cpu to the module.
#pragma once

#include <nanobind/nanobind.h>

void bind_attention(nanobind::module_& m);
void bind_pool(nanobind::module_& m);
