"""The quantities that benchmarks measure: our side, a rival's and a check of the answers, each in one function."""
