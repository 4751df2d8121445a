"""Figures from run records, for a paper, a slide and a page: matplotlib without pyplot's global state."""
