"""How good a model is on the held-out samples: scores sample by sample, and what a statistician makes of them."""
