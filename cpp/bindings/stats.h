#pragma once

#include "generate/generation_stats.h"

#include <pybind11/pybind11.h>

namespace overspill {

pybind11::tuple stats_tuple(const GenerationStats & stats);

}  // namespace overspill
