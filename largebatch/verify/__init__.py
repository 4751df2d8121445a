"""Proofs: certify, the step in the paper's own words, explain."""
