// The part of the recorder that runs for every tensor of a model: see hot_path.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fastinit {

void add_hot_path(pybind11::module_& m);

}  // namespace fastinit
