// Adds the linear layers of cpu/linear.h to the module.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "cpu/linear.h"

void bind_linear(nanobind::module_& m);

// By name; a value error names what there is.
mgf::WeightFormat weight_format(const std::string& name);
mgf::LinearIsa linear_isa(const std::string& name);  // "" is the best; only what this processor has
