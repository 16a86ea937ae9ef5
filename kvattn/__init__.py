"""kvattn: which attention gives a model the best quality for its KV-cache bytes, latency and hardware.

Importing the package registers what it ships: attention families (kvattn.attention), conversions (kvattn.convert).
"""

from kvattn import attention as _attention  # noqa: F401
from kvattn import convert as _convert  # noqa: F401
