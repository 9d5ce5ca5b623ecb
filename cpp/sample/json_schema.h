#pragma once

#include <string>

namespace overspill {

// The GBNF of a JSON schema, given as JSON. Throws std::invalid_argument that names the place in it.
std::string grammar_of_json_schema(const std::string & schema);

}  // namespace overspill
