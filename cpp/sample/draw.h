// One token out of the candidates.
#pragma once

#include "sample/candidates.h"
#include "sample/random.h"
#include "sample/sampling_options.h"
#include "sample/top_p.h"

#include <cstdint>

namespace overspill {

struct Chosen {
    int32_t id;
    float logit;
    double probability;
};

// Dynamic temperature (github.com/kalomaze/koboldcpp): more where the model is less sure.
float final_temperature(Candidates & candidates, const SamplingOptions & options);

// By which differences between logits are multiplied. The largest keeps them finite in single precision.
float scale_of(float temperature);

// Draws from what is kept; takes the most likely if the temperature is 0.
Chosen draw(Candidates & candidates, Random & random, float temperature);

// The draw where top-p alone truncates, and leaves thousands: where exactly it cuts need not be
// known. Draw from the whole row, and reject what top-p drops. A logit under which certainly too
// little mass is, which a sample suggests and the pass over the row confirms, answers that at
// once for nearly every draw; for the rest a pass adds up what is more likely.
Chosen draw_from_nucleus(Candidates & candidates, Random & random, float top_p, const Glance & seen, float temperature);

// Mirostat v2 (Basu et al., 2021): drops what would surprise more than mu bits, and moves mu so
// that the surprise comes to tau.
Chosen draw_mirostat(Candidates & candidates, Random & random, const SamplingOptions & options, float & mu);

}  // namespace overspill
