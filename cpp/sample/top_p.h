// Nucleus sampling (Holtzman et al., 2020), mostly without a list of the whole vocabulary.
#pragma once

#include "sample/candidates.h"

namespace overspill {

void cut_top_p(Candidates & candidates, float top_p);

// The most likely tokens, down to a logit, and an estimate of the rest from a few others, whose weights stay in
// `floats` of the candidates.
struct Glance {
    float low;
    double mass;
    double rest;
    double stands_for;  // logits for each one of the sample
};

// Cuts where a short list of the most likely tokens has the mass: one pass adds up the whole row,
// and only the list is sorted. Otherwise false, and `seen` is what the list and the sample say.
bool cut_top_p_of_most_likely(Candidates & candidates, float top_p, Glance & seen);

}  // namespace overspill
