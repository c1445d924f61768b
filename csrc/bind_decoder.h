// Adds the decoder of csrc/cpu to the module.
#pragma once

#include <nanobind/nanobind.h>

void bind_decoder(nanobind::module_& m);
