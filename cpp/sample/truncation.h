// Which candidates may be drawn: the truncations in llama.cpp's order.
#pragma once

#include "sample/candidates.h"
#include "sample/random.h"
#include "sample/sampling_options.h"

namespace overspill {

// Top-n-sigma, top-k, typical, top-p, min-p, XTC. XTC draws a random number.
void truncate(Candidates & candidates, const SamplingOptions & options, Random & random);

}  // namespace overspill
