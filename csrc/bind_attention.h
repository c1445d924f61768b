// Adds the KV cache, attention, norms and the thread pool of csrc/cpu to the module.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "cpu/attention.h"

void bind_attention(nanobind::module_& m);
void bind_pool(nanobind::module_& m);

mgf::KvFormat kv_format(const std::string& name);  // a value error names what there is
