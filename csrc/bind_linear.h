// Adds the linear layers of cpu/linear.h to the module.
#pragma once

#include <nanobind/nanobind.h>

void bind_linear(nanobind::module_& m);
