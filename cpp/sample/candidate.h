// A token that may be drawn, and the order of likelihood.
#pragma once

#include <cstdint>

namespace overspill {

struct Candidate {
    float logit;
    int32_t id;
    float weight;  // exp((logit - largest) * scale), once the list that it is in was weighed
};

// By logit, and by id among equals.
inline bool before(const Candidate & a, const Candidate & b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

}  // namespace overspill
