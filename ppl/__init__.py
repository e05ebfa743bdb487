"""A probabilistic programming language for generation.

A generation, text or image, is a probabilistic program; inference algorithms are interpretations of it.
"""

from ppl import progress as _progress  # noqa: F401  (before NumPyro, whose bars warn in notebooks)

# isort: split
from ppl.control_flow import scan as scan
from ppl.errors import AllParticlesDied as AllParticlesDied
from ppl.errors import BranchError as BranchError
from ppl.errors import DerivativeError as DerivativeError
from ppl.errors import DuplicateSite as DuplicateSite
from ppl.errors import InvalidWeight as InvalidWeight
from ppl.errors import MisplacedSite as MisplacedSite
from ppl.errors import ProgramError as ProgramError
from ppl.errors import SiteTypeError as SiteTypeError
from ppl.errors import SiteValueError as SiteValueError
from ppl.host import HostError as HostError
from ppl.host import host as host
from ppl.infer import infer as infer
from ppl.mixture import Mixture as Mixture
from ppl.mixture import mixture as mixture
from ppl.posterior import Posterior as Posterior
from ppl.process import Process as Process
from ppl.process import generate as generate
from ppl.program import Model as Model
from ppl.program import Program as Program
from ppl.program import condition as condition
from ppl.program import model as model
from ppl.program import static as static
from ppl.staging import scope as scope
from ppl.statements import deterministic as deterministic
from ppl.statements import factor as factor
from ppl.statements import observe as observe
from ppl.statements import sample as sample
from ppl.steering import steering as steering
from ppl.targets import Target as Target
from ppl.targets import guide as guide
from ppl.trace import Trace as Trace
from ppl.trace import log_density as log_density
from ppl.trace import simulate as simulate

__version__ = "0.1.0"
