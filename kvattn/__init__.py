"""kvattn: which attention gives a model the best quality for its KV-cache bytes, latency and hardware.

Importing the package registers what it ships: attention families (kvattn.attention), keep-policies (kvattn.cache.keep),
conversions (kvattn.convert).
"""

from kvattn import attention as _attention  # noqa: F401
from kvattn import convert as _convert  # noqa: F401
from kvattn.cache import keep as _keep  # noqa: F401
