"""Array code behind inference: resampling, log-weights, prefix sums. It knows no program and no model."""
