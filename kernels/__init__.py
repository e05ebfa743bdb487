"""Array code behind inference: resampling, log-weights, annealing, tokens, moves. It knows no program and no model."""

from ppl.kernels import annealing as annealing
from ppl.kernels import moves as moves
from ppl.kernels import resampling as resampling
from ppl.kernels import tokens as tokens
from ppl.kernels import truncation as truncation
from ppl.kernels import weights as weights

__all__ = ["annealing", "moves", "resampling", "tokens", "truncation", "weights"]
