# SPDX-License-Identifier: Apache-2.0
"""CUTLASS kernels for JAX: convs and matrix products fused with what follows them.

@jax_bolt.optimize
def predict(params, images):
    return model.apply(params, images)
"""

import importlib.metadata as _metadata

from ._src.api import advise as advise
from ._src.api import clear_cache as clear_cache
from ._src.api import explain as explain
from ._src.api import optimize as optimize
from ._src.api import tune as tune
from ._src.codesign.advice import Advice as Advice
from ._src.errors import CacheError as CacheError
from ._src.errors import CompileError as CompileError
from ._src.errors import UnsupportedError as UnsupportedError
from ._src.freeze import freeze as freeze
from ._src.options import options as options
from ._src.report import Report as Report
from ._src.site import Site as Site
from ._src.warm import start as _warm

try:
    __version__ = _metadata.version("jax_bolt")
except _metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

_warm.start()
