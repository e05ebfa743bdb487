"""Search: the generation of the highest reward, within a budget of network calls. All heuristic."""

from ppl.inference.search.noise_optimization import NoiseOptimization as NoiseOptimization
from ppl.inference.search.path_search import PathSearch as PathSearch
from ppl.inference.search.random_search import RandomSearch as RandomSearch
from ppl.inference.search.rollover import RolloverSearch as RolloverSearch
from ppl.inference.search.zero_order import ZeroOrderSearch as ZeroOrderSearch

__all__ = ["NoiseOptimization", "PathSearch", "RandomSearch", "RolloverSearch", "ZeroOrderSearch"]
