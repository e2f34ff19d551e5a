"""Width inference: dimensions as terms, one small rule an operator, verdicts with evidence."""
